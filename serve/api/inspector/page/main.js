// The page: two tabs, parameters, one or two panes, the API key, links, and the state that survives a reload of the tab.

import { Server, ServerError } from "./api.js";
import { Decide } from "./decide.js";
import { Details } from "./details.js";
import { Pane } from "./pane.js";
import { isLink, linkTo, stateOf } from "./share.js";
import { comparison } from "./sums.js";
import { Tabs } from "./tabs.js";

const PLACEHOLDERS = { json: '{"type": "object", …}', regex: "(yes|no)\\.", grammar: 'start: "yes" | "no"' };

const NARROW = "(max-width: 63.99rem)"; // as in the style sheet

const MAX_ALTERNATIVES = 100; // rows that the details show

const get = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.server = new Server(() => sessionStorage.getItem("key"));
    this.model = null;
    this.details = new Details(get("details"), get("side"), matchMedia(NARROW));
    this.panes = [new Pane(this)];
    get("panes").append(this.panes[0].root);
    this.decide = new Decide(this);
    this.tabs = new Tabs(get("tabs"), (name) => {
      get("compare").hidden = name !== "inspect";
      this.details.hide();
      this.#showSettings();
      if (name === "decide") get("decide").append(this.decide.root);
      this.#save();
    });
    this.#listen();
  }

  async open() {
    this.#restoreTab();
    await this.#readLink();
    await this.#connect();
  }

  /** The model's card, requested until the server answers. */
  async card() {
    if (this.model !== null) return this.model;
    this.model = await this.server.card();
    const { id, max_model_len: length, max_logprobs: maximum } = this.model;
    get("model").textContent = `${id}, ${length.toLocaleString("en")} tokens`;
    const { alternatives } = get("settings").elements;
    alternatives.max = Math.min(maximum, MAX_ALTERNATIVES);
    alternatives.value = Math.min(alternatives.value, alternatives.max);
    get("key").hidden = true;
    return this.model;
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
    this.#save();
  }

  /** Shows the totals of both panes and their difference. */
  compare() {
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

  /** Reacts to the error of a request, whose message the pane shows. */
  onError({ kind, message }) {
    if (["down", "key", "changed"].includes(kind)) {
      this.model = null; // another model may answer next
      this.server.forget();
      get("model").textContent = "not connected";
    }
    get("key").hidden = kind !== "key";
    if (kind !== "key") return;
    get("key").querySelector("p").textContent = `${message} The key is kept in this tab only.`;
    get("key").elements.key.focus();
  }

  async #connect() {
    try {
      await this.card();
      get("notice").textContent = "";
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.onError(error);
      if (error.kind !== "key") get("notice").textContent = error.message;
    }
  }

  #listen() {
    get("key").addEventListener("submit", async (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", get("key").elements.key.value);
      get("key").reset();
      await this.#connect();
    });
    get("compare").addEventListener("click", () => {
      this.#showPanes(this.panes.length === 1 ? 2 : 1);
      this.onEdit();
    });
    get("share").addEventListener("click", () => this.#share());
    get("theme").addEventListener("click", () => this.#toggleTheme());
    get("settings").addEventListener("input", () => {
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
    text.hidden = grammar.value === "";
    text.required = !text.hidden;
    text.placeholder = PLACEHOLDERS[grammar.value] ?? "";
  }

  get #state() {
    const settings = {};
    for (const { name, value } of get("settings").elements) if (name) settings[name] = value;
    return { tab: this.tabs.current, settings, panes: this.panes.map((pane) => pane.editor.state), decide: this.decide.state };
  }

  #save() {
    try {
      sessionStorage.setItem("state", JSON.stringify(this.#state));
    } catch {
      sessionStorage.removeItem("state"); // above the browser's limit; an older state would be misleading
    }
  }

  #restoreTab() {
    try {
      const saved = sessionStorage.getItem("state");
      if (saved) this.#restore(JSON.parse(saved));
    } catch {
      sessionStorage.removeItem("state"); // written by another version of this page
    }
  }

  /** Restores the state in the address, if any. It is not run: it may come from somebody else. */
  async #readLink() {
    try {
      const state = await stateOf(location.hash);
      if (state) this.#restore(state);
    } catch {
      get("notice").textContent = "The link is damaged and cannot be read.";
    }
  }

  #restore({ tab, settings, panes, decide }) {
    for (const [name, value] of Object.entries(settings)) {
      if (get("settings").elements[name]) get("settings").elements[name].value = value;
    }
    this.#showSettings();
    this.#showPanes(panes.length);
    panes.slice(0, 2).forEach((state, i) => this.panes[i].editor.set(state));
    if (decide) this.decide.set(decide); // not in links of older versions
    if (tab) this.tabs.select(tab);
    this.#save();
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
    const link = await linkTo(this.#state);
    history.replaceState(null, "", link);
    let place = "the address bar";
    try {
      await navigator.clipboard.writeText(link);
      place = "the clipboard and the address bar";
    } catch {
      // Not permitted, or not available over plain HTTP.
    }
    get("notice").textContent = `The link is in ${place}. It contains prompts, questions and parameters, but no API key.`;
  }

  #toggleTheme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  }
}

await new Page().open();
