// A pane: an editor, and the result of its last run.

import { Cells } from "./cells.js";
import { clone, make } from "./dom.js";
import { Editor } from "./editor.js";
import { asCsv, asJson, save } from "./export.js";
import { count } from "./format.js";
import { Run } from "./run.js";
import { Sums } from "./sums.js";
import { decode } from "./text.js";
import { totals } from "./totals.js";
import { Work } from "./work.js";

const SUMS_INTERVAL = 250; // ms, while tokens arrive

export class Pane {
  constructor(page) {
    this.page = page;
    this.root = clone("pane");
    this.runs = []; // the run of the prompt, and its branches
    this.run = null; // the one that is shown
    this.work = new Work(page, this);
    this.timer = null; // until the sums are shown again
    this.editor = new Editor(this.#part(".editor"), (error) => {
      if (error) this.#refuse(error);
      page.onEdit();
    });
    this.dock = this.#part(".dock"); // of the details on narrow screens
    this.usesSide = true; // on others
    this.cells = new Cells(this.#part(".cells"), this, page.details);
    this.sums = new Sums(this.root, this.cells);
    this.#listen();
  }

  /** Continues a run from token `index`, with `alternative` in its place. */
  async branch(from, index, alternative) {
    const settings = this.page.settings();
    if (settings === null) return;
    const run = from.branch(`${this.runs.length + 1}: from token ${count(index)}`, index);
    await this.work.run(async (signal) => {
      await run.add([alternative.id], "branch", signal);
      this.#addRun(run);
      // Take the focus only from the details: the user may have moved on.
      const { activeElement, body } = document;
      if (activeElement === body || this.page.details.element.contains(activeElement)) this.cells.focus(index);
      await this.#fill(run, settings, signal);
    });
  }

  /** Totals of the run that is shown; null without one. */
  get totals() {
    return this.run && totals(this.run.tokens);
  }

  stop() {
    this.work.stop();
  }

  /** Shows a run that was made elsewhere in place of the prompt's. */
  open(run) {
    this.stop();
    this.runs = [];
    this.#addRun(run);
  }

  showError(error) {
    this.#part(".error").textContent = error?.message ?? "";
    this.#part(".error").hidden = error === null;
  }

  showBusy(busy) {
    this.root.ariaBusy = String(busy);
    this.#part(".stop").hidden = !busy;
    if (busy) {
      this.page.details.hideFor(this);
      this.#part(".continue").hidden = true;
    } else if (this.run) this.#showSums();
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }

  #listen() {
    const click = (selector, action) => this.#part(selector).addEventListener("click", action);
    this.#part(".editor").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
    this.#part(".editor").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#start();
    });
    click(".score", () => this.#start({ max_tokens: 0 }));
    click(".stop", () => this.stop());
    click(".continue", () => this.#continue());
    click(".reply", () => this.#reply());
    click(".json", () => save(asJson(this.run), "tokens.json", "application/json"));
    click(".csv", () => save(asCsv(this.run), "tokens.csv", "text/csv"));
  }

  /** Runs the prompt; `overrides` take precedence over the page's parameters. */
  async #start(overrides = {}) {
    if (this.editor.empty) return this.#refuse("Enter a prompt first.");
    const { request } = this.editor; // read now: it may be edited while the server works
    const run = new Run(this.page.server, "1: the prompt", request);
    await this.work.run(async (signal) => {
      const { max_model_len: limit } = await this.page.card();
      const settings = this.page.settings(); // after card(), which sets the maximum of alternatives
      if (settings === null) return;
      const ids = await this.page.server.tokenize(request, signal);
      if (ids.length === 0) return this.#refuse("This text has no tokens.");
      if (ids.length > limit) {
        return this.#refuse(`The prompt is too long: ${count(ids.length)} tokens; the maximum is ${count(limit)}.`);
      }
      await run.add(ids, "prompt", signal);
      this.runs = [];
      this.#addRun(run);
      await this.#fill(run, { ...settings, ...overrides }, signal);
    });
  }

  async #continue() {
    const settings = this.page.settings();
    const { run } = this;
    if (settings !== null) await this.work.run((signal) => this.#fill(run, settings, signal));
  }

  #refuse(message) {
    this.showError({ message });
  }

  async #fill(run, settings, signal) {
    const { top_logprobs: alternatives, ...fields } = settings;
    this.#part(".status").textContent = `${count(run.tokens.length)} tokens: waiting for log-probs …`;
    await run.fill(fields, alternatives, (from) => this.#update(run, from), signal);
  }

  #addRun(run) {
    this.runs.push(run);
    this.#show(run);
  }

  #show(run) {
    this.page.details.hideFor(this);
    this.run = run;
    this.#part(".result").hidden = false;
    this.cells.show(run);
    const buttons = this.runs.map((other) => {
      const button = make("button", { type: "button", ariaPressed: String(other === run) }, other.title);
      button.addEventListener("click", () => this.#show(other));
      return button;
    });
    this.#part(".branches").replaceChildren(...buttons);
    this.#part(".branches").hidden = this.runs.length < 2;
    this.#showSums();
  }

  /** Updates the cells at once and the sums at intervals. */
  #update(run, from) {
    if (run !== this.run) return;
    this.cells.update(from);
    this.page.details.update(run, from);
    this.timer ??= setTimeout(() => this.#showSums(), SUMS_INTERVAL);
  }

  #showSums() {
    const { run } = this;
    clearTimeout(this.timer);
    this.timer = null;
    this.sums.show(run);
    this.#part(".exports").hidden = false;
    const generates = run.tokens.some((token) => token.origin === "generated");
    this.#part(".continue").hidden = run.finish === "stop" || this.work.running;
    this.#part(".reply").hidden = this.editor.mode !== "chat" || !generates || this.work.running;
    // Screen readers announce the status, so it changes once, at the end.
    if (!this.work.running) this.#part(".status").textContent = run.summary;
    this.page.compare();
  }

  #reply() {
    const bytes = this.run.tokens.filter((t) => t.origin !== "prompt" && !t.special).flatMap((t) => [...t.bytes]);
    this.editor.reply(decode(Uint8Array.from(bytes)));
    this.#part(".reply").hidden = true;
    this.page.onEdit();
  }
}
