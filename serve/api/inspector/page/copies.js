// A run as code that requests the same, as ids, and as a picture of its colored text.

import { client, curl } from "./code.js";
import { plain } from "./text.js";

const OPENAI_FIELDS = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logprobs", "top_logprobs"];

/** The request of a run: of its text or messages, or, for a branch or a text that was continued, of its first tokens. */
function request(run, model) {
  const { from, top_logprobs: alternatives, ...settings } = run.fills.at(-1);
  const { prompt, messages } = run.prompt;
  const isWhole = run.fills.length === 1 && run.tokens.every((token) => token.origin !== "branch");
  const scoring = { ...settings, prompt_logprobs: alternatives };
  if (isWhole && messages) {
    return { path: "v1/chat/completions", fields: { model, messages, logprobs: true, top_logprobs: alternatives, ...scoring } };
  }
  const input = isWhole && prompt ? prompt : run.tokens.slice(0, from).map((token) => token.id);
  return { path: "v1/completions", fields: { model, prompt: input, logprobs: alternatives, ...scoring } };
}

const literal = (value) => (value === true ? "True" : JSON.stringify(value));
const keywords = (fields) => Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value)},`);

export function runAsCurl(run, model, key) {
  const { path, fields } = request(run, model);
  return curl(path, JSON.stringify(fields, null, 2), key);
}

export function runAsPython(run, model, key) {
  const { path, fields } = request(run, model);
  const entries = Object.entries(fields);
  const known = entries.filter(([name]) => OPENAI_FIELDS.includes(name));
  const others = entries.filter(([name]) => !OPENAI_FIELDS.includes(name));
  const endpoint = path.includes("chat") ? "chat.completions" : "completions";
  const call = [`answer = client.${endpoint}.create(`, ...keywords(Object.fromEntries(known))];
  const rest = [`    extra_body=${JSON.stringify(Object.fromEntries(others))},`, ")", "print(answer.to_json())", ""];
  return [...(key ? ["import os", ""] : []), "from openai import OpenAI", "", client(key), ...call, ...rest].join("\n");
}

/** A program without a server. */
export function runAsLlm(run, model) {
  const { model: _, messages, prompt, top_logprobs: alternatives, logprobs, logprobs_mode: mode, ...options } = request(run, model).fields;
  const processed = mode === "processed_logprobs" ? { return_processed_logprobs: true } : {};
  const fields = { logprobs: alternatives ?? logprobs, ...processed, ...options };
  const call = messages ? `llm.chat(\n    ${literal(messages)},` : `llm.generate(\n    ${literal(prompt)},`;
  const lines = ["from logprobd import LLM", "", `with LLM(${literal(model)}) as llm:  # a folder, a GGUF file or a hub id`];
  const body = [`generation = ${call}`, ...keywords(fields), ")[0]", "print(generation)"].join("\n").split("\n");
  return [...lines, ...body.map((line) => `    ${line}`), ""].join("\n");
}

export const runAsIds = (run) => JSON.stringify(run.tokens.map((token) => token.id));

const LINE = 24; // px
const ADVANCE = 9; // px: about the width of a character
const WIDTH = 900;

/** The colored text as SVG; `cells` has the elements whose colors are taken. */
export function runAsSvg(run, cells) {
  const svg = ["", ""];
  let [x, y] = [0, LINE];
  run.tokens.forEach((token, i) => {
    const text = plain(token.bytes);
    const width = [...text].length * ADVANCE;
    if (x > 0 && x + width > WIDTH) [x, y] = [0, y + LINE];
    const style = getComputedStyle(cells.cell(i));
    svg[0] += `<rect x="${x}" y="${y - 17}" width="${width}" height="${LINE - 2}" fill="${style.backgroundColor}"/>`;
    svg[1] += `<text x="${x}" y="${y}" textLength="${width}" fill="${style.color}" xml:space="preserve">${escape(text)}</text>`;
    x += width;
    if (text.endsWith("\\n")) [x, y] = [0, y + LINE];
  });
  const back = getComputedStyle(document.body).backgroundColor;
  const open = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${y + 10}" font-family="monospace" font-size="15">`;
  return `${open}<rect width="100%" height="100%" fill="${back}"/>${svg.join("")}</svg>\n`;
}

const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
