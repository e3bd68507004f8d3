// A pane: an editor, and the result of its last run.

import { Cells } from "./cells.js";
import { make } from "./dom.js";
import { Editor } from "./editor.js";
import { asCsv, asJson, save } from "./export.js";
import { count } from "./format.js";
import { Run } from "./run.js";
import { Sums } from "./sums.js";
import { decode } from "./text.js";
import { totals } from "./totals.js";

const SUMS_INTERVAL = 250; // ms, while tokens arrive

export class Pane {
  constructor(page) {
    this.page = page;
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.runs = []; // the run of the prompt, and its branches
    this.run = null; // the one that is shown
    this.abort = null; // AbortController of the current request
    this.timer = null; // until the sums are shown again
    this.editor = new Editor(this.#part(".editor"), (error) => {
      if (error) this.#showError(error);
      page.onEdit();
    });
    this.cells = new Cells(this.#part(".cells"), {
      point: (index, cell) => page.details.show(this, index, cell),
      leave: () => page.details.hideSoon(),
      enter: () => page.details.enter(),
    });
    this.sums = new Sums(this.root, this.cells);
    this.#listen();
  }

  /** Continues a run from token `index`, with `alternative` in its place. */
  async branch(from, index, alternative) {
    const settings = this.page.settings();
    if (settings === null) return;
    const run = from.branch(`${this.runs.length + 1}: from token ${count(index)}`, index);
    await this.#work(async (signal) => {
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
    this.abort?.abort();
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
    if (this.editor.empty) return this.#showError("Enter a prompt first.");
    const { request } = this.editor; // read now: it may be edited while the server works
    const run = new Run(this.page.server, "1: the prompt", request);
    await this.#work(async (signal) => {
      const { max_model_len: limit } = await this.page.card();
      const settings = this.page.settings(); // after card(), which sets the maximum of alternatives
      if (settings === null) return;
      const ids = await this.page.server.tokenize(request, signal);
      if (ids.length === 0) return this.#showError("This text has no tokens.");
      if (ids.length > limit) {
        return this.#showError(`The prompt is too long: ${count(ids.length)} tokens; the maximum is ${count(limit)}.`);
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
    if (settings !== null) await this.#work((signal) => this.#fill(run, settings, signal));
  }

  /** Aborts the current work, does `work` and shows its error in this pane. */
  async #work(work) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    this.#showError("");
    this.page.details.hideFor(this);
    this.#showBusy(true);
    try {
      await this.page.card();
      await work(abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.#showError(error.message);
        this.page.onError(error);
      }
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.#showBusy(false);
        if (this.run) this.#showSums();
      }
    }
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
    this.#part(".continue").hidden = run.finish === "stop" || this.abort !== null;
    this.#part(".reply").hidden = this.editor.mode !== "chat" || !generates || this.abort !== null;
    // Screen readers announce the status, so it changes once, at the end.
    if (this.abort === null) this.#part(".status").textContent = run.summary;
    this.page.compare();
  }

  #reply() {
    const bytes = this.run.tokens.filter((t) => t.origin !== "prompt" && !t.special).flatMap((t) => [...t.bytes]);
    this.editor.reply(decode(Uint8Array.from(bytes)));
    this.#part(".reply").hidden = true;
    this.page.onEdit();
  }

  #showBusy(busy) {
    this.root.ariaBusy = String(busy);
    this.#part(".stop").hidden = !busy;
    if (busy) this.#part(".continue").hidden = true;
  }

  #showError(text) {
    this.#part(".error").textContent = text;
    this.#part(".error").hidden = text === "";
  }
}
