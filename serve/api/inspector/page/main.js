// The page: two tabs, parameters, one or two panes, the API key, links, and the state that survives a reload of the tab.

import { Connection } from "./connection.js";
import { Decide } from "./decide.js";
import { Details } from "./details.js";
import { make } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { importedRun } from "./import.js";
import { Pane } from "./pane.js";
import { Saved } from "./saved.js";
import { isLink, linkTo, stateOf } from "./share.js";
import { Store } from "./store.js";
import { comparison } from "./sums.js";
import { Tabs } from "./tabs.js";

const PLACEHOLDERS = { json: '{"type": "object", …}', regex: "(yes|no)\\.", grammar: 'start: "yes" | "no"' };

const NARROW = "(max-width: 63.99rem)"; // as in the style sheet

const MAX_ALTERNATIVES = 100; // rows that the details show

const get = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.cause = null; // of the notice
    this.connection = new Connection(get("key"), this);
    this.store = new Store();
    this.saved = new Saved(get("saved"), this.store, this);
    this.details = new Details(get("details"), get("side"), matchMedia(NARROW));
    this.panes = [new Pane(this)];
    get("panes").append(this.panes[0].root);
    this.decide = new Decide(this);
    this.tabs = new Tabs(get("tabs"), (name) => {
      get("compare").hidden = name !== "inspect";
      this.details.hide();
      this.#showSettings();
      if (name === "decide") get("decide").append(this.decide.root);
      this.save();
    });
    this.#listen();
  }

  async start() {
    await this.#restoreTab();
    await this.#readLink();
    await this.connection.open();
  }

  get server() {
    return this.connection.server;
  }

  get model() {
    return this.connection.model;
  }

  card() {
    return this.connection.card();
  }

  /** Shows the model. Errors of the connection end. */
  onConnect({ id, max_model_len: length, max_logprobs: maximum, sampling_defaults: defaults }) {
    get("model").textContent = `${id}, ${length.toLocaleString("en")} tokens`;
    const { alternatives } = get("settings").elements;
    alternatives.max = Math.min(maximum, MAX_ALTERNATIVES);
    alternatives.value = Math.min(alternatives.value, alternatives.max);
    for (const [name, value] of Object.entries(defaults)) {
      const field = get("settings").elements[name];
      if (field) field.placeholder = name === "top_k" && value <= 0 ? "off" : value;
    }
    this.#forgive("down", "key");
    if (this.cause === "connection") this.notify("");
  }

  onDisconnect() {
    get("model").textContent = "not connected";
  }

  /** Reacts to the error of a request, whose message the pane shows. */
  onError(error) {
    this.connection.fail(error);
  }

  /** Shows a message until the next one, or until its `cause` ends; with a button if it can be undone. */
  notify(text, { cause = null, undo = null } = {}) {
    this.cause = cause;
    get("notice").textContent = text;
    if (!undo) return;
    const button = make("button", { type: "button" }, "Undo");
    button.addEventListener("click", () => {
      this.notify("");
      undo();
    });
    get("notice").append(" ", button);
  }

  /** The parameters as fields of a request; null after the browser has reported an invalid one. */
  settings() {
    const form = get("settings");
    form.querySelector("details").open ||= !form.checkValidity();
    if (!form.reportValidity()) return null;
    const fields = {};
    for (const { name, value, type } of form.elements) {
      if (name && value !== "") fields[name] = type === "number" ? Number(value) : value;
    }
    const { alternatives, stop, colors, grammar, grammar_text: text, ...rest } = fields;
    if (grammar !== undefined) rest.structured_outputs = { [grammar]: text };
    if (stop !== undefined) rest.stop = stop.replaceAll("\\n", "\n");
    return { ...rest, top_logprobs: alternatives };
  }

  /** Saves the state after an edit, and removes the link, which no longer matches, from the address bar. */
  onEdit() {
    if (isLink(location.hash)) history.replaceState(null, "", location.pathname + location.search);
    if (this.cause === "link") this.notify("");
    this.save();
  }

  /** Shows the totals of both panes and their difference. */
  compare() {
    get("welcome").hidden = this.panes.some((pane) => pane.run !== null);
    this.#showDifferences();
    const [left, right] = this.panes.map((pane) => pane.totals);
    get("comparison").hidden = !left || !right;
    if (left && right) get("comparison").replaceChildren(comparison(left, right));
  }

  /** Shows a run in the first pane, and continues it from token `index` with `alternative`. */
  inspect(run, index, alternative) {
    this.tabs.select("inspect");
    this.panes[0].open(run);
    this.panes[0].branch(run, index, alternative);
  }

  #showDifferences() {
    if (document.documentElement.dataset.colors !== "difference") return;
    this.panes.forEach((pane, i) => pane.showDifference(this.panes[1 - i]?.run ?? null));
  }

  /** Runs an example. */
  #example({ parameters, editor, decide }) {
    this.tabs.select(decide ? "decide" : "inspect");
    for (const [name, value] of Object.entries(parameters ?? {})) get("settings").elements[name].value = value;
    if (decide) {
      this.decide.set(decide);
      this.decide.run();
    } else {
      this.panes[0].editor.set(editor);
      this.panes[0].start();
    }
    this.onEdit();
  }

  /** Shows a saved run in the first pane. */
  async open(id) {
    this.tabs.select("inspect");
    await this.panes[0].restore({ saved: id });
    this.save();
  }

  /** Shows an exported run in the first pane. Throws an error if it is not one. */
  load(exported) {
    const run = importedRun(exported, this.server);
    this.tabs.select("inspect");
    this.panes[0].open(run);
    this.panes[0].keep();
  }

  /** Ends the errors of these kinds, whose cause has ended. */
  #forgive(...kinds) {
    for (const view of [...this.panes, this.decide]) view.forgive(kinds);
  }

  #listen() {
    get("compare").addEventListener("click", () => {
      this.#showPanes(this.panes.length === 1 ? 2 : 1);
      this.onEdit();
    });
    get("share").addEventListener("click", () => this.#share());
    get("welcome").addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) this.#example(EXAMPLES[button.dataset.example]);
    });
    get("keys").addEventListener("click", () => get("help").showModal());
    document.addEventListener("keydown", ({ key, target }) => {
      if (key === "?" && !target.closest("input, textarea, select, dialog")) get("help").showModal();
    });
    get("theme").addEventListener("click", () => this.#toggleTheme());
    get("saved-runs").addEventListener("click", async () => {
      await this.saved.toggle();
      get("saved-runs").ariaExpanded = String(!get("saved").hidden);
    });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) for (const pane of this.panes) pane.keep();
    });
    get("settings").addEventListener("input", () => {
      this.#forgive("refused");
      this.#showSettings();
      this.onEdit();
    });
    get("settings").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", () => this.#readLink());
    const theme = localStorage.getItem("theme");
    if (theme) document.documentElement.dataset.theme = theme;
  }

  /** Shows the colors, which are those of surprisal in other tabs, and the text of a grammar if there is one. */
  #showSettings() {
    const { colors, grammar, grammar_text: text } = get("settings").elements;
    document.documentElement.dataset.colors = this.tabs.current === "inspect" ? colors.value : "surprisal";
    this.#showDifferences();
    text.hidden = grammar.value === "";
    text.required = !text.hidden;
    text.placeholder = PLACEHOLDERS[grammar.value] ?? "";
  }

  /** What a link contains. */
  get #shared() {
    const settings = {};
    for (const { name, value } of get("settings").elements) if (name) settings[name] = value;
    return { tab: this.tabs.current, settings, panes: this.panes.map((pane) => pane.editor.state), decide: this.decide.state };
  }

  /** Saves the state for a reload of the tab; runs are in the store. */
  save() {
    const state = { ...this.#shared, panes: this.panes.map((pane) => pane.state) };
    try {
      sessionStorage.setItem("state", JSON.stringify(state));
    } catch {
      sessionStorage.removeItem("state"); // above the browser's limit; an older state would be misleading
    }
  }

  async #restoreTab() {
    try {
      const saved = sessionStorage.getItem("state");
      if (saved) await this.#restore(JSON.parse(saved));
    } catch {
      sessionStorage.removeItem("state"); // written by another version of this page
    }
  }

  /** Restores the state in the address, unless it is shown already. It is not run: it may come from somebody else. */
  async #readLink() {
    try {
      const state = await stateOf(location.hash);
      if (state && JSON.stringify(state) !== JSON.stringify(this.#shared)) await this.#restore(state);
    } catch {
      this.notify("The link is damaged and cannot be read.", { cause: "link" });
    }
  }

  /** Replaces all that the page shows. */
  async #restore({ tab, settings, panes, decide }) {
    this.notify("");
    get("settings").reset();
    for (const [name, value] of Object.entries(settings)) {
      if (get("settings").elements[name]) get("settings").elements[name].value = value;
    }
    this.#showSettings();
    this.#showPanes(panes.length);
    if (decide) this.decide.set(decide); // not in links of older versions
    this.tabs.select(tab ?? "inspect");
    await Promise.all(panes.slice(0, 2).map((state, i) => this.panes[i].restore(state)));
    this.save();
  }

  #showPanes(number) {
    while (this.panes.length > Math.max(1, number)) {
      const pane = this.panes.pop();
      pane.stop();
      pane.root.remove();
    }
    if (this.panes.length < Math.min(2, number)) {
      const pane = new Pane(this);
      pane.editor.set(this.panes[0].editor.state);
      this.panes.push(pane);
      get("panes").append(pane.root);
    }
    get("compare").ariaPressed = String(this.panes.length > 1);
    this.compare();
  }

  async #share() {
    const link = await linkTo(this.#shared);
    history.replaceState(null, "", link);
    let place = "the address bar";
    try {
      await navigator.clipboard.writeText(link);
      place = "the clipboard and the address bar";
    } catch {
      // Not permitted, or not available over plain HTTP.
    }
    this.notify(`The link is in ${place}. It contains prompts, questions and parameters, but no results and no API key.`);
  }

  #toggleTheme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  }
}

await new Page().start();
