// A run: the tokens of a prompt and those generated after it, with their log-probs.
//
// All requests are chat completions with `prompt_token_ids`, so that a branch continues exactly the tokens shown.

import { sourceOf } from "./api.js";
import { count } from "./format.js";

const FIRST_PIECE = 512; // tokens scored by the first request, to show numbers early; each further one doubles them

/**
 * A token is {id, bytes, special, origin, logprob, rank, top}. `origin` is prompt, branch or generated. `logprob` is
 * undefined until it is known, and null for the first token. `top` contains {id, bytes, special, logprob, rank}. A token
 * that was generated in a grammar has `allowedMass`, a probability, and `forced`.
 */
export class Run {
  /** `prompt` is the editor's {prompt} or {messages}. */
  constructor(server, title, prompt) {
    this.server = server;
    this.title = title;
    this.prompt = prompt;
    this.tokens = [];
    this.fills = []; // parameters of requests, each with the position `from` which its tokens were requested
    this.form = null; // {grammar, start}: JSON of the grammar that holds the end of the text, and where its text begins
    this.source = null; // {model, fingerprint} that computed the numbers
    this.finish = null; // stop or length, after the end
    this.usage = null;
    this.seconds = null;
  }

  /** A run that begins with the first `length` tokens of this one. */
  branch(title, length) {
    const run = new Run(this.server, title, this.prompt);
    run.tokens = this.tokens.slice(0, length);
    run.fills = this.fills.filter((fill) => fill.from < length);
    run.source = this.source;
    if (this.form?.start <= length) run.form = this.form;
    return run;
  }

  /** What can be saved; restored() makes a run of it. */
  get content() {
    const { server, ...content } = this;
    return content;
  }

  static restored(server, content) {
    return Object.assign(new Run(server, content.title, content.prompt), content);
  }

  get summary() {
    const generated = this.tokens.filter((token) => token.origin === "generated").length;
    const parts = [`${count(this.tokens.length - generated)} prompt tokens`, `${count(generated)} generated`];
    const forced = this.tokens.filter((token) => token.forced).length;
    if (forced) parts.push(`${count(forced)} forced`);
    if (this.seconds !== null) parts.push(`${this.seconds.toFixed(2)} s`);
    const cached = this.usage?.prompt_tokens_details.cached_tokens;
    if (cached) parts.push(`${count(cached)} cached`);
    if (this.finish === "stop") parts.push("finished");
    else if (this.finish) parts.push(this.fills.at(-1).max_tokens === 0 ? "scored only" : "reached max tokens");
    return parts.join(", ");
  }

  async add(ids, origin, signal) {
    await this.server.loadBytes(ids, signal);
    for (const id of ids) this.tokens.push({ ...this.#token(id), origin, logprob: undefined, rank: null, top: [] });
  }

  /** Scores tokens without numbers and generates new ones. Calls `onChange(from)` when tokens from `from` on change. */
  async fill(settings, alternatives, onChange, signal) {
    const { structured_outputs: grammar, ...others } = settings;
    const common = { ...others, logprobs: true, top_logprobs: alternatives, stream_options: { include_usage: true } };
    const startTime = performance.now();
    const ids = this.tokens.map((token) => token.id);
    Object.assign(this, { finish: null, usage: null, seconds: null });
    this.fills.push({ from: ids.length, top_logprobs: alternatives, ...settings });
    // The server finds the tokens of a scored piece in its prefix cache when the next one is requested.
    for (let end = FIRST_PIECE; end < ids.length; end *= 2) {
      if (end <= this.#unknown || this.#unknown < 0) continue;
      await this.#request({ ...common, max_tokens: 0, prompt_token_ids: ids.slice(0, end) }, alternatives, onChange, signal);
    }
    const body = { ...common, ...this.#grammarFields(grammar), prompt_token_ids: ids };
    const { finish, usage, answerStart } = await this.#request(body, alternatives, onChange, signal);
    if (this.form?.start === ids.length && usage?.completion_tokens_details) {
      this.form = answerStart === null ? null : { ...this.form, start: ids.length + answerStart }; // after the reasoning
    }
    Object.assign(this, { finish, usage });
    this.seconds = (performance.now() - startTime) / 1000;
  }

  /** The most likely tokens after a text of `ids`. */
  async following(ids, alternatives, signal) {
    const body = { prompt_token_ids: ids, max_tokens: 1, temperature: 0, logprobs: true, top_logprobs: alternatives };
    const found = [];
    for await (const event of this.server.stream(body, signal)) {
      this.source = sourceOf(event, this.source);
      for (const entry of event.choices[0]?.logprobs?.content ?? []) found.push(...entry.top_logprobs);
    }
    return found.map((other) => this.#alternative(other));
  }

  /** Index of the first token without numbers, or -1. */
  get #unknown() {
    return this.tokens.findIndex((token) => token.logprob === undefined);
  }

  /** Fields for a grammar. Tokens that were generated in it belong to its text, which goes on. */
  #grammarFields(grammar) {
    const { length } = this.tokens;
    const isSame = grammar && this.form?.grammar === JSON.stringify(grammar);
    if (!isSame) this.form = grammar ? { grammar: JSON.stringify(grammar), start: length } : null;
    if (!grammar) return {};
    return { structured_outputs: grammar, ...(this.form.start < length && { grammar_start: this.form.start }) };
  }

  /** Sends one request; returns its {finish, usage, answerStart}; the last is null without reasoning before an answer. */
  async #request(body, alternatives, onChange, signal) {
    const start = this.#unknown;
    const result = { finish: null, usage: null, answerStart: null };
    const scoring = { prompt_logprobs: alternatives, prompt_logprobs_start: start, prompt_logprobs_format: "columns" };
    for await (const event of this.server.stream(start < 0 ? body : { ...body, ...scoring }, signal)) {
      this.source = sourceOf(event, this.source); // throws if another model answers
      if (event.prompt_logprobs_columns) {
        await this.#score(event.prompt_logprobs_columns, signal);
        onChange(start);
      }
      const from = this.tokens.length;
      const choice = event.choices[0];
      for (const entry of choice?.logprobs?.content ?? []) this.tokens.push(this.#generated(entry));
      if (choice?.finish_reason) result.finish = choice.finish_reason;
      if (event.usage) result.usage = event.usage;
      result.answerStart = choice?.answer_start ?? result.answerStart;
      if (this.tokens.length > from) onChange(from);
    }
    return result;
  }

  async #score(columns, signal) {
    await this.server.loadBytes(columns.top_token_ids.flat(), signal);
    const first = Math.max(1, columns.start);
    if (columns.start <= 1) Object.assign(this.tokens[0], { logprob: null });
    columns.logprobs.forEach((logprob, row) => {
      const top = columns.top_token_ids[row].map((id, j) => ({
        ...this.#token(id),
        logprob: columns.top_logprobs[row][j],
        rank: columns.top_ranks[row][j],
      }));
      Object.assign(this.tokens[first + row], { logprob, rank: columns.ranks[row], top });
    });
  }

  #generated(entry) {
    const top = entry.top_logprobs.map((other) => this.#alternative(other));
    const { allowed_mass: allowedMass, forced = false } = entry;
    return { ...this.#alternative(entry), origin: "generated", top, allowedMass, forced };
  }

  #alternative({ token_id: id, bytes, logprob, rank }) {
    if (!this.server.bytes.has(id)) this.server.bytes.set(id, Uint8Array.from(bytes));
    return { ...this.#token(id), logprob, rank };
  }

  #token(id) {
    return { id, bytes: this.server.bytes.get(id), special: this.server.special.has(id) };
  }
}
