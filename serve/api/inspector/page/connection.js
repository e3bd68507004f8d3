// The connection to the server: the card of its model, the API key, and waiting for a server that does not respond.

import { Server, ServerError } from "./api.js";

const RETRY_AFTER = 2000; // ms

export class Connection {
  /** `form` asks for the key. `page` has onConnect(card), onDisconnect() and notify(). */
  constructor(form, page) {
    this.form = form;
    this.page = page;
    this.server = new Server(() => sessionStorage.getItem("key"));
    this.model = null; // its card
    this.timer = null;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", form.elements.key.value);
      form.reset();
      await this.open();
    });
  }

  async open() {
    try {
      await this.card();
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.fail(error);
      if (error.kind !== "key") this.page.notify(error.message, { cause: "connection" });
    }
  }

  /** The model's card, requested until the server answers. */
  async card() {
    if (this.model === null) {
      this.model = await this.server.card();
      clearTimeout(this.timer);
      this.form.hidden = true;
      this.page.onConnect(this.model);
    }
    return this.model;
  }

  /** Reacts to the error of a request: asks for the key, or tries again until the server responds. */
  fail({ kind, message }) {
    if (["down", "key", "changed"].includes(kind)) {
      this.model = null; // another model may answer next
      this.server.forget();
      this.page.onDisconnect();
    }
    clearTimeout(this.timer);
    if (kind === "down") this.timer = setTimeout(() => this.open(), RETRY_AFTER);
    this.form.hidden = kind !== "key";
    if (kind !== "key") return;
    this.form.querySelector("p").textContent = `${message} The key is kept in this tab only.`;
    this.form.elements.key.focus();
  }
}
