// A pane: an editor, and below it what the last run of it gave.

import { Cells } from "./cells.js";
import { drawCurve, drawHistogram } from "./charts.js";
import { Editor } from "./editor.js";
import { asCsv, asJson, save } from "./export.js";
import { count, logprob, number, percent } from "./format.js";
import { Run } from "./run.js";
import { draw } from "./text.js";
import { mostSurprising, totals } from "./totals.js";

const SURPRISING = 10;
const ROWS = [
  ["tokens", (sums) => count(sums.tokens)],
  ["log-prob, sum", (sums) => number(sums.sum)],
  ["log-prob, mean", (sums) => number(sums.mean)],
  ["perplexity", (sums) => number(sums.perplexity)],
  ["bits per byte", (sums) => number(sums.bitsPerByte)],
  ["rank 1", (sums) => (sums.first === null ? "–" : percent(sums.first))],
];

export class Pane {
  /** `page` has server, details, settings() and card(), and is told: typed(), counted(), failed(error). */
  constructor(page) {
    this.page = page;
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.runs = []; // the run of the prompt, and its branches
    this.run = null; // the one that is shown
    this.abort = null; // of the request on its way
    this.editor = new Editor(this.#part(".editor"), (error) => {
      if (error) this.#say(error);
      page.typed();
    });
    this.cells = new Cells(this.#part(".cells"), {
      point: (index, cell) => page.details.show(this, index, cell),
      leave: () => page.details.leave(),
      enter: () => page.details.enter(),
    });
    this.#listen();
  }

  /** Continues from token `index` with `alternative` in its place. */
  async branch(index, alternative) {
    const settings = this.page.settings();
    if (settings === null) return;
    const before = this.run.tokens.slice(0, index);
    const run = new Run(this.page.server, `${this.runs.length + 1}: from token ${count(index)}`, before);
    await this.#work(run, async (signal) => {
      await run.add([alternative.id], "branch", signal);
      this.#keep(run);
      await this.#fill(run, settings, signal);
    });
    this.cells.focus(Math.min(index, run.tokens.length - 1));
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
    click(".json", () => save(this.#json(), "tokens.json", "application/json"));
    click(".csv", () => save(asCsv(this.run), "tokens.csv", "text/csv"));
  }

  /** Runs what is typed; `instead` stands over the parameters. */
  async #start(instead = {}) {
    if (this.editor.empty) return this.#say("There is nothing to run yet: type a prompt.");
    const run = new Run(this.page.server, "1: the prompt");
    await this.#work(run, async (signal) => {
      const { max_model_len: limit } = await this.page.card();
      const settings = this.page.settings(); // now: what may be asked for is known
      if (settings === null) return;
      const ids = await this.page.server.tokenize(this.editor.request, signal);
      if (ids.length === 0) return this.#say("This text has no tokens.");
      if (ids.length > limit) {
        return this.#say(`The prompt is too long: ${count(ids.length)} tokens, and the model takes ${count(limit)}.`);
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
    if (settings !== null) await this.#work(run, (signal) => this.#fill(run, settings, signal));
  }

  /** One piece of work at a time; whatever comes of it is said in this pane. */
  async #work(run, work) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    this.#say("");
    this.page.details.hide();
    this.#busy(true);
    try {
      await work(abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.#busy(false);
        if (run === this.run) this.#showAll(run);
      }
    }
  }

  async #fill(run, settings, signal) {
    const { top_logprobs: alternatives, ...fields } = settings;
    this.#status(`${count(run.tokens.length)} tokens: waiting for their numbers …`);
    await run.fill(fields, alternatives, (from) => this.#changed(run, from), signal);
  }

  /** Adds a run to those that can be shown, and shows it. */
  #keep(run) {
    this.runs.push(run);
    this.#show(run);
  }

  #show(run) {
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

  /** Cells at once; sums once for a frame, however many tokens come. */
  #changed(run, from) {
    if (run !== this.run) return;
    this.cells.update(from);
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#showAll(this.run);
    });
  }

  #showAll(run) {
    const { tokens } = run;
    const generated = tokens.filter((token) => token.origin === "generated");
    const columns = [tokens.filter((token) => token.origin !== "generated"), generated, tokens].map(totals);
    const rows = ROWS.map(([name, value]) => row([name, ...columns.map(value)]));
    this.#part(".totals tbody").replaceChildren(...rows);
    drawCurve(this.#part(".curve"), tokens, (index) => this.cells.focus(index));
    drawHistogram(this.#part(".histogram"), tokens);
    this.#part(".surprising").replaceChildren(...mostSurprising(tokens, SURPRISING).map((i) => this.#surprise(i)));
    this.#part(".exports").hidden = false;
    this.#part(".continue").hidden = run.finish === "stop" || this.abort !== null;
    this.#part(".reply").hidden = this.editor.mode !== "chat" || generated.length === 0 || this.abort !== null;
    const cached = run.usage?.prompt_tokens_details.cached_tokens;
    const parts = [`${count(tokens.length - generated.length)} prompt tokens`, `${count(generated.length)} generated`];
    if (run.seconds !== null) parts.push(`${run.seconds.toFixed(2)} s`);
    if (cached) parts.push(`${count(cached)} from the cache`);
    if (run.finish) parts.push(run.finish === "stop" ? "ended by itself" : "stopped at max tokens");
    this.#status(parts.join(", "));
    this.page.counted();
  }

  #surprise(index) {
    const token = this.run.tokens[index];
    const item = document.createElement("li");
    const button = document.createElement("button");
    const name = document.createElement("span");
    name.className = this.cells.cell(index).className;
    draw(name, token.bytes);
    button.type = "button";
    button.append(name, ` ${logprob(token.logprob)}, rank ${count(token.rank)}`);
    button.addEventListener("click", () => this.cells.focus(index));
    item.append(button);
    return item;
  }

  #reply() {
    const bytes = this.run.tokens.filter((t) => t.origin !== "prompt" && !t.special).flatMap((t) => [...t.bytes]);
    this.editor.reply(new TextDecoder().decode(Uint8Array.from(bytes)));
    this.#part(".reply").hidden = true;
    this.page.typed();
  }

  #json() {
    return asJson(this.run, this.page.model.id, { ...this.editor.request, ...this.page.settings() });
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

function row([name, ...values]) {
  const element = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  element.append(head, ...values.map((value) => Object.assign(document.createElement("td"), { textContent: value })));
  return element;
}
