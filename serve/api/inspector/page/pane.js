// A pane: an editor, and below it what the last run of it gave.

import { Cells } from "./cells.js";
import { Editor } from "./editor.js";
import { asCsv, asJson, save } from "./export.js";
import { count } from "./format.js";
import { Run } from "./run.js";
import { Sums } from "./sums.js";
import { decoded } from "./text.js";
import { totals } from "./totals.js";

const SUMS_EVERY = 250; // ms, while tokens come

export class Pane {
  /** `page` has server, details, settings() and card(), and is told: typed(), counted(), failed(error). */
  constructor(page) {
    this.page = page;
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.runs = []; // the run of the prompt, and its branches
    this.run = null; // the one that is shown
    this.abort = null; // of the request on its way
    this.timer = null; // until the sums are shown again
    this.editor = new Editor(this.#part(".editor"), (error) => {
      if (error) this.#say(error);
      page.typed();
    });
    this.cells = new Cells(this.#part(".cells"), {
      point: (index, cell) => page.details.point(this, index, cell),
      leave: () => page.details.leave(),
      enter: () => page.details.enter(),
    });
    this.sums = new Sums(this.root, this.cells);
    this.#listen();
  }

  /** Continues from token `index` of a run with `alternative` in its place. */
  async branch(from, index, alternative) {
    const settings = this.page.settings();
    if (settings === null) return;
    const run = from.branch(`${this.runs.length + 1}: from token ${count(index)}`, index);
    await this.#work(async (signal) => {
      await run.add([alternative.id], "branch", signal);
      this.#keep(run);
      // Whoever is elsewhere by now stays there.
      const { activeElement: at, body } = document;
      if (at === body || this.page.details.element.contains(at)) this.cells.focus(index);
      await this.#fill(run, settings, signal);
    });
  }

  /** Sums over the run that is shown, null without one. */
  get totals() {
    return this.run && totals(this.run.tokens);
  }

  /** Ends what is on its way. */
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

  /** Runs what is typed; `instead` stands over the parameters. */
  async #start(instead = {}) {
    if (this.editor.empty) return this.#say("Enter a prompt first.");
    const { request } = this.editor; // now: it may be changed while the server works
    const run = new Run(this.page.server, "1: the prompt", request);
    await this.#work(async (signal) => {
      const { max_model_len: limit } = await this.page.card();
      const settings = this.page.settings(); // now: what may be asked for is known
      if (settings === null) return;
      const ids = await this.page.server.tokenize(request, signal);
      if (ids.length === 0) return this.#say("This text has no tokens.");
      if (ids.length > limit) {
        return this.#say(`The prompt is too long: ${count(ids.length)} tokens; the maximum is ${count(limit)}.`);
      }
      await run.add(ids, "prompt", signal);
      this.runs = [];
      this.#keep(run);
      await this.#fill(run, { ...settings, ...instead }, signal);
    });
  }

  async #continue() {
    const settings = this.page.settings();
    const { run } = this;
    if (settings !== null) await this.#work((signal) => this.#fill(run, settings, signal));
  }

  /** One piece of work at a time; whatever comes of it is said in this pane. */
  async #work(work) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    this.#say("");
    this.page.details.hideOf(this);
    this.#busy(true);
    try {
      await this.page.card();
      await work(abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.#busy(false);
        if (this.run) this.#showAll(this.run);
      }
    }
  }

  async #fill(run, settings, signal) {
    const { top_logprobs: alternatives, ...fields } = settings;
    this.#status(`${count(run.tokens.length)} tokens: waiting for log-probs …`);
    await run.fill(fields, alternatives, (from) => this.#changed(run, from), signal);
  }

  /** Adds a run to those that can be shown, and shows it. */
  #keep(run) {
    this.runs.push(run);
    this.#show(run);
  }

  #show(run) {
    this.page.details.hideOf(this);
    this.run = run;
    this.#part(".result").hidden = false;
    this.cells.show(run);
    const buttons = this.runs.map((each) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: each.title, ariaPressed: String(each === run) });
      button.addEventListener("click", () => this.#show(each));
      return button;
    });
    this.#part(".branches").replaceChildren(...buttons);
    this.#part(".branches").hidden = this.runs.length < 2;
    this.#showAll(run);
  }

  /** Cells at once; sums now and then. */
  #changed(run, from) {
    if (run !== this.run) return;
    this.cells.update(from);
    this.page.details.changed(run, from);
    this.timer ??= setTimeout(() => this.#showAll(this.run), SUMS_EVERY);
  }

  #showAll(run) {
    clearTimeout(this.timer);
    this.timer = null;
    this.sums.show(run);
    this.#part(".exports").hidden = false;
    const generates = run.tokens.some((token) => token.origin === "generated");
    this.#part(".continue").hidden = run.finish === "stop" || this.abort !== null;
    this.#part(".reply").hidden = this.editor.mode !== "chat" || !generates || this.abort !== null;
    if (this.abort === null) this.#status(run.summary); // what is said aloud is said once, at the end
    this.page.counted();
  }

  #reply() {
    const bytes = this.run.tokens.filter((t) => t.origin !== "prompt" && !t.special).flatMap((t) => [...t.bytes]);
    this.editor.reply(decoded(Uint8Array.from(bytes)));
    this.#part(".reply").hidden = true;
    this.page.typed();
  }

  #busy(busy) {
    this.root.ariaBusy = String(busy);
    this.#part(".stop").hidden = !busy;
    if (busy) this.#part(".continue").hidden = true;
  }

  #fail(error) {
    this.#say(error.message);
    this.page.failed(error);
  }

  #say(text) {
    this.#part(".error").textContent = text;
    this.#part(".error").hidden = text === "";
  }

  #status(text) {
    this.#part(".status").textContent = text;
  }
}
