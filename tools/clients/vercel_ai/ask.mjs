// The `ai` package: objects, calls of tools and texts, whole and streamed. Prints JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";

const MODEL = "SmolLM2-135M-Instruct";
const options = { baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY };
const compatible = createOpenAICompatible({ ...options, name: "logprobd", supportsStructuredOutputs: true });
const openai = createOpenAI(options);

const city = {
  prompt: "Paris has 2 million inhabitants.",
  output: Output.object({ schema: z.strictObject({ name: z.string().max(20), population: z.int().min(0).max(100_000_000) }) }),
};
const weather = {
  prompt: "What is the weather in Oslo?",
  tools: {
    weather: tool({
      description: "The forecast of a city.",
      inputSchema: z.strictObject({ city: z.string().max(20), days: z.int().min(1) }),
    }),
  },
  toolChoice: "required",
};

const shown = { providerOptions: { openai: { logprobs: 2 } }, include: { requestBody: true } };
const results = {};
for (const [name, model] of Object.entries({
  compatible: compatible(MODEL),
  chat: openai.chat(MODEL),
  responses: openai.responses(MODEL),
})) {
  const request = { model, temperature: 0, maxOutputTokens: 200, maxRetries: 0, ...shown };
  const result = (results[name] = { cities: [], calls: [], logprobs: [], finish: [], warnings: [] });
  for (const answer of await wholeAndStreamed({ ...request, ...city })) {
    result.cities.push(await answer.output);
    result.logprobs.push((await answer.providerMetadata)?.openai?.logprobs?.flat());
    result.finish.push(await answer.finishReason);
    result.warnings.push(...((await answer.warnings) ?? []));
    result.request ??= (await answer.request).body;
  }
  for (const answer of await wholeAndStreamed({ ...request, ...weather })) {
    result.calls.push((await answer.toolCalls).map(({ toolName, input }) => [toolName, input]));
    result.finish.push(await answer.finishReason);
    result.warnings.push(...((await answer.warnings) ?? []));
  }
}
console.log(JSON.stringify(results));

async function wholeAndStreamed(request) {
  const onError = ({ error }) => {
    throw error;
  };
  const stream = streamText({ ...request, onError });
  await stream.consumeStream();
  return [await generateText(request), stream];
}
