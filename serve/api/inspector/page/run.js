// One text with its numbers: the tokens of a prompt, and those that are generated after it.
//
// Everything goes through chat completions with `prompt_token_ids`: a branch is then exactly the tokens that are seen.

import { sourceOf } from "./api.js";
import { count } from "./format.js";

const FIRST_PIECE = 512; // tokens that are scored first, for a long prompt to have numbers soon; then twice as many, ...

/**
 * A token: {id, bytes, special, origin, logprob, rank, top}. `origin` is prompt, branch or generated. `logprob` is
 * undefined until it is known, null for the first token, which has none. `top` holds {id, bytes, special, logprob, rank}.
 */
export class Run {
  /** `prompt` is what was typed: {prompt} or {messages}. */
  constructor(server, title, prompt) {
    this.server = server;
    this.title = title;
    this.prompt = prompt;
    this.tokens = [];
    this.fills = []; // the parameters with which tokens were asked for, each with the position `from` which
    this.source = null; // who gave the numbers: {model, fingerprint}
    this.finish = null; // stop or length, when it has ended
    this.usage = null;
    this.seconds = null;
  }

  /** A run that begins with the first `length` tokens of this one. */
  branch(title, length) {
    const run = new Run(this.server, title, this.prompt);
    run.tokens = this.tokens.slice(0, length);
    run.fills = this.fills.filter((fill) => fill.from < length);
    run.source = this.source;
    return run;
  }

  /** What there is to say of it in a line. */
  get summary() {
    const generated = this.tokens.filter((token) => token.origin === "generated").length;
    const parts = [`${count(this.tokens.length - generated)} prompt tokens`, `${count(generated)} generated`];
    if (this.seconds !== null) parts.push(`${this.seconds.toFixed(2)} s`);
    const cached = this.usage?.prompt_tokens_details.cached_tokens;
    if (cached) parts.push(`${count(cached)} cached`);
    if (this.finish === "stop") parts.push("finished");
    else if (this.finish) parts.push(this.fills.at(-1).max_tokens === 0 ? "scored only" : "reached max tokens");
    return parts.join(", ");
  }

  /** The ids of all tokens. */
  get ids() {
    return this.tokens.map((token) => token.id);
  }

  /** Adds tokens without numbers. */
  async add(ids, origin, signal) {
    await this.server.learn(ids, signal);
    for (const id of ids) this.tokens.push({ ...this.#token(id), origin, logprob: undefined, rank: null, top: [] });
  }

  /**
   * Has the tokens scored that have no numbers, and new ones generated. Calls `onChange(from, known)` when tokens from
   * `from` on have come or got numbers.
   */
  async fill(settings, alternatives, onChange, signal) {
    const common = { ...settings, logprobs: true, top_logprobs: alternatives, stream_options: { include_usage: true } };
    const began = performance.now();
    const { ids } = this;
    Object.assign(this, { finish: null, usage: null, seconds: null });
    this.fills.push({ from: ids.length, top_logprobs: alternatives, ...settings });
    // What is scored in a piece is in the server's cache when the next one asks for it.
    for (let end = FIRST_PIECE; end < ids.length; end *= 2) {
      if (end <= this.#unknown || this.#unknown < 0) continue;
      await this.#ask({ ...common, max_tokens: 0, prompt_token_ids: ids.slice(0, end) }, alternatives, onChange, signal);
    }
    const { finish, usage } = await this.#ask({ ...common, prompt_token_ids: ids }, alternatives, onChange, signal);
    Object.assign(this, { finish, usage });
    this.seconds = (performance.now() - began) / 1000;
  }

  /** The first token whose numbers are not known; -1 if all are. */
  get #unknown() {
    return this.tokens.findIndex((token) => token.logprob === undefined);
  }

  /** One request; {finish, usage} of it. */
  async #ask(body, alternatives, onChange, signal) {
    const start = this.#unknown;
    const ended = { finish: null, usage: null };
    const numbers = { prompt_logprobs: alternatives, prompt_logprobs_start: start, prompt_logprobs_format: "columns" };
    for await (const event of this.server.stream(start < 0 ? body : { ...body, ...numbers }, signal)) {
      this.source = sourceOf(event, this.source); // numbers of two models do not belong into one text
      if (event.prompt_logprobs_columns) {
        await this.#score(event.prompt_logprobs_columns, signal);
        onChange(start);
      }
      const from = this.tokens.length;
      const choice = event.choices[0];
      for (const entry of choice?.logprobs?.content ?? []) this.tokens.push(this.#generated(entry));
      if (choice?.finish_reason) ended.finish = choice.finish_reason;
      if (event.usage) ended.usage = event.usage;
      if (this.tokens.length > from) onChange(from);
    }
    return ended;
  }

  async #score(columns, signal) {
    await this.server.learn(columns.top_token_ids.flat(), signal);
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
    const top = entry.top_logprobs.map((other) => this.#told(other));
    return { ...this.#told(entry), origin: "generated", top };
  }

  #told({ token_id: id, bytes, logprob, rank }) {
    if (!this.server.bytes.has(id)) this.server.bytes.set(id, Uint8Array.from(bytes));
    return { ...this.#token(id), logprob, rank };
  }

  #token(id) {
    return { id, bytes: this.server.bytes.get(id), special: this.server.special.has(id) };
  }
}
