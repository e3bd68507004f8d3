// A pane: an editor, and the result of its last run.

import { Cells } from "./cells.js";
import { clone, make } from "./dom.js";
import { Editor } from "./editor.js";
import { runAsCurl, runAsIds, runAsLlm, runAsPython, runAsSvg } from "./copies.js";
import { asCsv, asJson, save } from "./export.js";
import { count } from "./format.js";
import { Run } from "./run.js";
import { Sums } from "./sums.js";
import { TokenTable } from "./table.js";
import { decode } from "./text.js";
import { totals } from "./totals.js";
import { Tree } from "./tree.js";
import { Work } from "./work.js";

const NAME_LENGTH = 60; // characters of the prompt
const SUMS_INTERVAL = 250; // ms, while tokens arrive

export class Pane {
  constructor(page) {
    this.page = page;
    this.root = clone("pane");
    this.runs = []; // the run of the prompt, and its branches
    this.run = null; // the one that is shown
    this.work = new Work(page, this);
    this.timer = null; // until the sums are shown again
    this.entry = null; // {id, name} of the runs in the store
    this.error = null;
    this.editor = new Editor(this.#part(".editor"), (error) => {
      this.forgive(["refused"]);
      if (error) this.#refuse(error);
      this.#showStale();
      page.onEdit();
    });
    this.dock = this.#part(".dock"); // of the details on narrow screens
    this.usesSide = true; // on others
    this.cells = new Cells(this.#part(".cells"), this, page.details);
    this.sums = new Sums(this.root, this.cells);
    this.table = new TokenTable(this.#part(".token-table"), this.cells);
    this.tree = new Tree(page, this.#part(".tree"));
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

  /** Colors the differences to `other`, or to the prompt's own run if this is a branch of it. */
  showDifference(other) {
    const base = other ?? (this.run === this.runs[0] ? null : this.runs[0]);
    if (this.run) this.cells.compare(base);
  }

  /** The editor's state, and where the runs are saved. */
  get state() {
    return { ...this.editor.state, ...(this.run && { saved: this.entry.id, shown: this.runs.indexOf(this.run) }) };
  }

  /** Shows a saved state: that of the editor, if it is given, and the runs, if any. */
  async restore({ saved, shown, ...editor }) {
    this.stop();
    this.#replace([]);
    this.showError(null);
    if (editor.mode) this.editor.set(editor);
    const found = saved && (await this.page.store.get(saved).catch(() => null));
    if (!found || this.run || this.work.running) return;
    const { runs, state } = found.content;
    if (!editor.mode) this.editor.set(state);
    this.#replace(runs.map((content) => Run.restored(this.page.server, content)), found.entry);
    this.#show(this.runs[shown] ?? this.runs.at(-1));
  }

  /** Shows a run that was made elsewhere in place of the prompt's. */
  open(run) {
    this.stop();
    this.showError(null);
    const { prompt: text, messages } = run.prompt;
    if (typeof text === "string") this.editor.set({ ...this.editor.state, mode: "text", text });
    if (messages) this.editor.set({ ...this.editor.state, mode: "chat", messages });
    this.#replace([run]);
  }

  /** Saves the runs in the browser, and where they are. */
  async keep() {
    if (!this.run) return;
    const { entry, runs, run } = this;
    try {
      const about = { ...entry, time: Date.now(), tokens: run.tokens.length, model: run.source?.model };
      const content = { state: this.editor.state, runs: runs.map((each) => each.content) };
      this.page.save();
      await this.page.store.put(about, content);
      await this.page.saved.refresh();
    } catch (error) {
      this.page.notify(`This run cannot be saved in the browser: ${error.message}`);
    }
  }

  /** Ends an error of these kinds. */
  forgive(kinds) {
    if (kinds.includes(this.error?.kind)) this.showError(null);
  }

  showError(error) {
    this.error = error;
    this.#part(".error").textContent = error?.message ?? "";
    this.#part(".error").hidden = error === null;
  }

  showBusy(busy) {
    this.root.ariaBusy = String(busy);
    this.#part(".stop").hidden = !busy;
    if (busy) {
      this.page.details.hideFor(this);
      this.#part(".continue").hidden = true;
    } else if (this.run) {
      this.#showSums();
      this.keep();
    }
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }

  #listen() {
    const click = (selector, action) => this.#part(selector).addEventListener("click", action);
    this.#part(".editor").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    this.#part(".editor").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.start();
    });
    click(".score", () => this.start({ max_tokens: 0 }));
    click(".stop", () => this.stop());
    click(".continue", () => this.#continue());
    click(".reply", () => this.#reply());
    click(".json", () => save(asJson(this.run), "tokens.json", "application/json"));
    click(".csv", () => save(asCsv(this.run), "tokens.csv", "text/csv"));
    click(".svg", () => save(runAsSvg(this.run, this.cells), "tokens.svg", "image/svg+xml"));
    const copies = { curl: runAsCurl, Python: runAsPython, LLM: runAsLlm, ids: runAsIds };
    this.#part(".copy").addEventListener("change", ({ target }) => {
      const [noun, write] = [target.value, copies[target.value]];
      target.value = "";
      this.#copy(noun, write(this.run, this.run.source?.model, this.page.server.key()));
    });
  }

  /** Shows a text, and copies it if the browser permits. */
  async #copy(noun, text) {
    Object.assign(this.#part(".code"), { value: text, hidden: false, ariaLabel: noun });
    const copied = await navigator.clipboard.writeText(text).then(() => true, () => false);
    this.page.notify(copied ? `${noun}: in the clipboard.` : `${noun}: copy it from the field below.`);
  }

  /** Runs the prompt; `overrides` take precedence over the page's parameters. */
  async start(overrides = {}) {
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
      this.#replace([run]);
      await this.#fill(run, { ...settings, ...overrides }, signal);
    });
  }

  async #continue() {
    const settings = this.page.settings();
    const { run } = this;
    if (settings !== null) await this.work.run((signal) => this.#fill(run, settings, signal));
  }

  #refuse(message) {
    this.showError({ kind: "refused", message });
  }

  async #fill(run, settings, signal) {
    const { top_logprobs: alternatives, ...fields } = settings;
    this.#part(".status").textContent = `${count(run.tokens.length)} tokens: waiting for log-probs …`;
    await run.fill(fields, alternatives, (from) => this.#update(run, from), signal);
  }

  /** Shows the last of other runs in place of those shown; nothing if there are none. */
  #replace(runs, entry = newEntry(runs[0])) {
    Object.assign(this, { runs, entry });
    if (runs.length > 0) this.#show(runs.at(-1));
    else {
      this.page.details.hideFor(this);
      this.run = null;
      for (const selector of [".result", ".exports", ".continue", ".reply"]) this.#part(selector).hidden = true;
      this.#part(".status").textContent = "";
      this.page.compare();
    }
  }

  #addRun(run) {
    this.runs.push(run);
    this.#show(run);
  }

  #show(run) {
    this.page.details.hideFor(this);
    this.run = run;
    this.tree.close();
    this.#part(".code").hidden = true;
    this.#part(".result").hidden = false;
    this.cells.show(run);
    this.#part(".branches").replaceChildren(...this.runs.map((other) => this.#branchView(other)));
    this.#part(".branches").hidden = this.runs.length < 2;
    this.#showSums();
  }

  /** A button that shows a run, and one that deletes it unless it is the prompt's. */
  #branchView(run) {
    const button = make("button", { type: "button", ariaPressed: String(run === this.run) }, run.title);
    button.addEventListener("click", () => this.#show(run));
    if (run === this.runs[0]) return button;
    const remove = make("button", { type: "button", ariaLabel: `Delete ${run.title}` }, "×");
    remove.addEventListener("click", () => this.#remove(run));
    return make("span", { className: "branch-item" }, button, remove);
  }

  /** Deletes a branch, which can be undone while its runs are shown. */
  #remove(run) {
    if (this.work.running) this.stop();
    const { runs, run: shown } = this;
    this.runs = runs.filter((other) => other !== run);
    this.#show(shown === run ? this.runs.at(-1) : shown);
    this.keep();
    this.page.notify(`Branch “${run.title}” is deleted.`, {
      undo: () => {
        if (this.runs[0] !== runs[0]) return;
        this.runs = runs;
        this.#show(run);
        this.keep();
      },
    });
  }

  /** Says whether the result is that of the prompt in the editor. */
  #showStale() {
    const isStale = this.run !== null && JSON.stringify(this.run.prompt) !== JSON.stringify(this.editor.request);
    this.#part(".stale").hidden = !isStale;
    this.#part(".result").classList.toggle("old", isStale);
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
    this.table.show(run.tokens);
    this.#showStale();
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

/** An entry of the store for a run and its branches. */
function newEntry(run) {
  if (!run) return null;
  const { prompt = "", messages } = run.prompt;
  const text = (messages?.at(-1)?.content ?? prompt).trim().replace(/\s+/gu, " ");
  const id = `${Date.now()}-${Math.random()}`;
  return { id, name: Array.from(text).slice(0, NAME_LENGTH).join("") || "Untitled" };
}
