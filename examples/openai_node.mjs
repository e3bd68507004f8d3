// Print the log-prob of each token with the openai package for Node, from a running server.
//
// Start the server with `make serve`, then run: npm install --no-save openai@6 && node examples/openai_node.mjs
// Set OPENAI_BASE_URL=http://host:port/v1 for another address and OPENAI_API_KEY for an API key.
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const line = (token, logprob) => console.log(`${JSON.stringify(token)} ${logprob}`);

const models = await client.models.list().catch((error) => {
  if (!(error instanceof OpenAI.APIConnectionError)) throw error;
  console.error(`no server at ${client.baseURL}: start one with \`make serve\` or set OPENAI_BASE_URL`);
  process.exit(1);
});
const model = models.data[0].id;
console.log(`Using model: ${model}`);
const request = {
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  max_tokens: 32,
  temperature: 0,
  logprobs: true,
  top_logprobs: 2,
};

// prompt_logprobs is not an OpenAI field; the package passes it through in both directions.
const answer = await client.chat.completions.create({ ...request, prompt_logprobs: 0, return_token_ids: true });
console.log(`\n== chat: ${JSON.stringify(answer.choices[0].message.content)}`);
for (const { token, logprob } of answer.choices[0].logprobs.content) line(token, logprob);

console.log("\n== prompt");
answer.prompt_token_ids.forEach((id, i) => {
  // JavaScript reorders numeric keys of an object, so look the token up by its id.
  const entry = answer.prompt_logprobs[i]?.[id];
  line(entry?.decoded_token ?? null, entry?.logprob ?? null);
});

const chunks = [];
let text = "";
for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  chunks.push(...(chunk.choices[0].logprobs?.content ?? []));
}
console.log(`\n== stream: ${JSON.stringify(text)}`);
for (const { token, logprob } of chunks) line(token, logprob);

const completion = { model, prompt: "The capital of France is", max_tokens: 4, temperature: 0, echo: true, logprobs: 1 };
const { choices } = await client.completions.create(completion);
console.log(`\n== completions: ${JSON.stringify(choices[0].text)}`);
choices[0].logprobs.tokens.forEach((token, i) => line(token, choices[0].logprobs.token_logprobs[i]));
