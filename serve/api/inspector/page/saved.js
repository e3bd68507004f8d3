// The list of saved runs: names, opening, deletion with undo, and files that were exported.

import { make } from "./dom.js";
import { count } from "./format.js";

const MAX_FILE = 256 << 20; // bytes
const time = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export class Saved {
  /** `page` has open(saved) and load(exported), which show a run, and notify(). */
  constructor(root, store, page) {
    this.root = root;
    this.store = store;
    this.page = page;
    root.querySelector("[type=file]").addEventListener("change", (event) => this.#load(event.target));
  }

  toggle() {
    this.root.hidden = !this.root.hidden;
    if (!this.root.hidden) return this.refresh();
  }

  /** Shows the runs as they are now, if the list is open. */
  async refresh() {
    if (this.root.hidden) return;
    try {
      const entries = await this.store.list();
      this.root.querySelector("ol").replaceChildren(...entries.map((entry) => this.#item(entry)));
      this.root.querySelector(".empty").hidden = entries.length > 0;
    } catch (error) {
      this.page.notify(`This browser does not give access to saved runs: ${error.message}`);
    }
  }

  #item(entry) {
    const { id, name, tokens, model } = entry;
    const field = make("input", { type: "text", value: name, ariaLabel: "Name" });
    field.addEventListener("change", () => this.store.rename(id, field.value));
    const open = make("button", { type: "button" }, "Open");
    open.addEventListener("click", () => this.page.open(id));
    const remove = make("button", { type: "button", ariaLabel: `Delete ${name}` }, "×");
    remove.addEventListener("click", () => this.#delete(id));
    const about = `${time.format(entry.time)}, ${count(tokens)} tokens, ${model ?? "no model"}`;
    return make("li", {}, field, make("span", { className: "hint" }, about), open, remove);
  }

  async #delete(id) {
    const saved = await this.store.get(id);
    await this.store.delete(id);
    await this.refresh();
    this.page.notify(`“${saved.entry.name}” is deleted.`, {
      undo: async () => {
        await this.store.put(saved.entry, saved.content);
        await this.refresh();
      },
    });
  }

  async #load(input) {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    try {
      if (file.size > MAX_FILE) throw new Error(`it is larger than ${MAX_FILE >> 20} MiB`);
      this.page.load(JSON.parse(await file.text()));
      this.page.notify(`${file.name} is open.`);
    } catch (error) {
      this.page.notify(`${file.name} cannot be opened: ${error.message}`);
    }
  }
}
