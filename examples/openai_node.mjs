// Asks a running server for log-probs with the openai package for node, and prints a line for each token.
//
// Start one with `make serve`, then: npm install --no-save openai@6 && node examples/openai_node.mjs
// Another address: OPENAI_BASE_URL=http://host:port/v1; a key: OPENAI_API_KEY=...
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const line = (token, logprob) => console.log(`${JSON.stringify(token)} ${logprob}`);

const model = (await client.models.list()).data[0].id;
console.log(`Using model: ${model}`);
const request = {
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  max_tokens: 32,
  temperature: 0,
  logprobs: true,
  top_logprobs: 2,
};

// prompt_logprobs is no field of OpenAI's; the package sends and returns it as it is.
const answer = await client.chat.completions.create({ ...request, prompt_logprobs: 0, return_token_ids: true });
console.log(`\n== chat: ${JSON.stringify(answer.choices[0].message.content)}`);
for (const { token, logprob } of answer.choices[0].logprobs.content) line(token, logprob);

console.log("\n== prompt");
answer.prompt_token_ids.forEach((id, i) => {
  // An object's keys that are numbers come in their own order in JavaScript, so a token is found by its id.
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
