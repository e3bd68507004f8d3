// The server's public API.

/** An error with a message for the user. `kind` is down, key, refused, failed or changed; `param` the field that is wrong. */
export class ServerError extends Error {
  constructor(kind, message, param = null) {
    super(message);
    this.kind = kind;
    this.param = param;
  }
}

/** {model, fingerprint} of an event. Throws if they differ from `known`. */
export function sourceOf({ model, system_fingerprint: fingerprint }, known) {
  if (known && (known.model !== model || known.fingerprint !== fingerprint)) {
    throw new ServerError("changed", "The server was restarted with another model or other options. Run the prompt again.");
  }
  return { model, fingerprint };
}

export class Server {
  /** `key` is a function: the key may change while the page is open. */
  constructor(key) {
    this.key = key;
    this.forget();
  }

  /** Clears what depends on the model. */
  forget() {
    this.source = null; // {model, fingerprint} to which the following belong
    this.bytes = new Map(); // token id -> Uint8Array
    this.special = new Set();
  }

  /** The card of the served model: id, max_model_len, max_logprobs. */
  async card() {
    const [models, info] = await Promise.all([this.#json("v1/models"), this.#json("tokenizer_info")]);
    this.special = new Set(info.special_token_ids);
    return models.data[0];
  }

  async tokenize(request, signal) {
    return (await this.#json("tokenize", request, signal)).tokens;
  }

  /** Requests the bytes of ids that are not known. */
  async loadBytes(ids, signal) {
    const unknown = [...new Set(ids)].filter((id) => !this.bytes.has(id));
    if (unknown.length === 0) return;
    const answer = await this.#json("detokenize", { tokens: unknown, return_token_bytes: true }, signal);
    unknown.forEach((id, i) => this.bytes.set(id, Uint8Array.from(answer.token_bytes[i])));
  }

  /** Answers of a decision; `body` is JSON. */
  async decide(body, signal) {
    return await this.#json("v1/decisions", body, signal);
  }

  async *stream(request, signal) {
    const response = await this.#ask("v1/chat/completions", { ...request, stream: true }, signal);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError("failed", event.error.message);
      this.source = sourceOf(event, this.source);
      yield event;
    }
    throw new ServerError("down", "The server closed the connection before the end of its response.");
  }

  async #json(path, body, signal) {
    const response = await this.#ask(path, body, signal);
    try {
      return await response.json();
    } catch (error) {
      throw asServerError(error);
    }
  }

  async #ask(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    if (this.key()) headers.Authorization = `Bearer ${this.key()}`;
    const options = body === undefined ? { headers } : { headers, method: "POST", body: typeof body === "string" ? body : JSON.stringify(body) };
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...options, signal });
    } catch (error) {
      throw asServerError(error);
    }
    if (response.ok) return response;
    if (response.status === 401) {
      throw new ServerError("key", this.key() ? "The API key is invalid." : "This server requires an API key.");
    }
    const error = (await response.json().catch(() => null))?.error;
    const kind = error?.code === "not_ready" ? "down" : "refused"; // the model is being loaded
    throw new ServerError(kind, error?.message ?? `The server responded with status ${response.status}.`, error?.param);
  }
}

function asServerError(error) {
  if (error.name === "AbortError") return error;
  return new ServerError("down", `The server at ${location.host} is not responding. Is it running?`);
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    throw asServerError(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}
