// One text with its numbers: the tokens of a prompt, and those that are generated after it.
//
// Everything goes through chat completions with `prompt_token_ids`: a branch is then exactly the tokens that are seen.

const FIRST_PIECE = 512; // tokens that are scored first, for a long prompt to have numbers soon; then twice as many, ...

/**
 * A token: {id, bytes, special, origin, logprob, rank, top}. `origin` is prompt, branch or generated. `logprob` is
 * undefined until it is known, null for the first token, which has none. `top` holds {id, bytes, special, logprob, rank}.
 */
export class Run {
  /** `tokens` are known already, such as those before a branch. */
  constructor(server, title, tokens = []) {
    this.server = server;
    this.title = title;
    this.tokens = tokens;
    this.finish = null; // stop or length, when it has ended
    this.usage = null;
    this.seconds = null;
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
    // What is scored in a piece is in the server's cache when the next one asks for it.
    for (let end = FIRST_PIECE; end < ids.length; end *= 2) {
      if (end <= this.#unknown || this.#unknown < 0) continue;
      await this.#ask({ ...common, max_tokens: 0, prompt_token_ids: ids.slice(0, end) }, alternatives, onChange, signal);
    }
    await this.#ask({ ...common, prompt_token_ids: ids }, alternatives, onChange, signal);
    this.seconds = (performance.now() - began) / 1000;
  }

  /** The first token whose numbers are not known; -1 if all are. */
  get #unknown() {
    return this.tokens.findIndex((token) => token.logprob === undefined);
  }

  async #ask(body, alternatives, onChange, signal) {
    const start = this.#unknown;
    const numbers = { prompt_logprobs: alternatives, prompt_logprobs_start: start, prompt_logprobs_format: "columns" };
    for await (const event of this.server.stream(start < 0 ? body : { ...body, ...numbers }, signal)) {
      if (event.prompt_logprobs_columns) {
        await this.#score(event.prompt_logprobs_columns, signal);
        onChange(start);
      }
      const from = this.tokens.length;
      const choice = event.choices[0];
      for (const entry of choice?.logprobs?.content ?? []) this.tokens.push(this.#generated(entry));
      if (choice?.finish_reason) this.finish = choice.finish_reason;
      if (event.usage) this.usage = event.usage;
      if (this.tokens.length > from) onChange(from);
    }
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
