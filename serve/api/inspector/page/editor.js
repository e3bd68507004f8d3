// The editor of a prompt: a text or a chat. Runs and errors never clear it.

import { clone } from "./dom.js";

const MAX_FILE = 4 << 20; // bytes: more than any model accepts, and more than a browser edits smoothly

export class Editor {
  /** `root` is the pane's form; `onEdit(error)` is called after every change, and for a file that cannot be read. */
  constructor(root, onEdit) {
    this.root = root;
    this.prompt = root.querySelector(".prompt");
    this.messages = root.querySelector(".messages");
    root.querySelector(".add").addEventListener("click", () => {
      const roles = this.#chat.map((message) => message.role);
      this.#add(roles.at(-1) === "user" ? "assistant" : "user", "").focus();
      onEdit();
    });
    root.addEventListener("input", () => {
      this.#showMode();
      onEdit();
    });
    root.querySelector("[type=file]").addEventListener("change", (event) => this.#load(event.target, onEdit));
    this.set({ mode: "text", text: "", messages: [{ role: "user", content: "" }] });
  }

  get state() {
    return { mode: this.mode, text: this.prompt.value, messages: this.#chat };
  }

  get mode() {
    return this.root.querySelector("[name=mode]:checked").value;
  }

  set({ mode, text, messages }) {
    this.root.querySelector(`[name=mode][value=${mode === "chat" ? "chat" : "text"}]`).checked = true;
    this.prompt.value = text;
    this.messages.replaceChildren();
    for (const { role, content } of messages) this.#add(role, content);
    this.#showMode();
  }

  /** The body of a /tokenize request. */
  get request() {
    return this.mode === "chat" ? { messages: this.#chat } : { prompt: this.prompt.value };
  }

  get empty() {
    return this.mode === "chat" ? this.#chat.length === 0 : this.prompt.value === "";
  }

  /** Adds a reply and an empty user message. */
  reply(text) {
    this.#add("assistant", text);
    this.#add("user", "").focus();
  }

  get #chat() {
    return Array.from(this.messages.children, (message) => ({
      role: message.querySelector("select").value,
      content: message.querySelector("textarea").value,
    }));
  }

  #add(role, content) {
    const message = clone("message");
    const text = message.querySelector("textarea");
    message.querySelector("select").value = role;
    text.value = content;
    message.querySelector("button").addEventListener("click", () => {
      message.remove();
      this.root.dispatchEvent(new Event("input"));
    });
    this.messages.append(message);
    return text;
  }

  #showMode() {
    this.prompt.hidden = this.mode === "chat";
    this.root.querySelector(".chat").hidden = this.mode !== "chat";
  }

  async #load(input, onEdit) {
    const [file] = input.files;
    if (!file) return;
    input.value = ""; // so that the same file can be chosen again
    if (file.size > MAX_FILE) return onEdit(`${file.name} is larger than ${MAX_FILE >> 20} MiB.`);
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      this.set({ ...this.state, mode: "text", text });
      onEdit();
    } catch {
      onEdit(`${file.name} is not UTF-8 text.`);
    }
  }
}
