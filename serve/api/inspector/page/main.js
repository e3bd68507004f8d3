// The page: parameters, one pane or two, the key, links, and what is kept for a reload of this tab.

import { Server, ServerError } from "./api.js";
import { Details } from "./details.js";
import { count, number } from "./format.js";
import { Pane } from "./pane.js";
import { isLink, linkTo, stateOf } from "./share.js";

const get = (id) => document.getElementById(id);
const COMPARED = [
  ["tokens", "tokens", count],
  ["log-prob, sum", "sum", number],
  ["perplexity", "perplexity", number],
  ["bits per byte", "bitsPerByte", number],
];

class Page {
  constructor() {
    this.server = new Server(() => sessionStorage.getItem("key"));
    this.model = null;
    this.details = new PageDetails(this);
    this.panes = [new Pane(this)];
    get("panes").append(this.panes[0].root);
    this.#listen();
  }

  async open() {
    this.#recall();
    await this.#follow();
    await this.connect();
  }

  /** Asks who is there; shows the form for the key where one is needed. */
  async connect() {
    try {
      await this.card();
      this.say("");
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.failed(error);
      if (error.kind !== "key") this.say(error.message);
    }
  }

  /** What is known of the model; asked for until the server answers. */
  async card() {
    if (this.model !== null) return this.model;
    this.model = await this.server.card();
    const { id, max_model_len: length, max_logprobs: most } = this.model;
    get("model").textContent = `${id}, ${length.toLocaleString("en")} tokens`;
    const { alternatives } = get("settings").elements;
    alternatives.max = most;
    alternatives.value = Math.min(alternatives.value, most);
    get("key").hidden = true;
    return this.model;
  }

  /** The fields of a request; null, and the browser says why, where one is out of range. */
  settings() {
    const form = get("settings");
    form.querySelector("details").open ||= !form.checkValidity();
    if (!form.reportValidity()) return null;
    const fields = {};
    for (const { name, value, type } of form.elements) {
      if (name && value !== "") fields[name] = type === "number" ? Number(value) : value;
    }
    const { alternatives, stop, ...rest } = fields;
    if (stop !== undefined) rest.stop = stop.replaceAll("\\n", "\n");
    return { ...rest, top_logprobs: alternatives };
  }

  /** Something was typed: the link in the address bar, if any, no longer holds it. */
  typed() {
    if (isLink(location.hash)) history.replaceState(null, "", location.pathname + location.search);
    this.#keep();
  }

  /** For a reload of this tab. */
  #keep() {
    try {
      sessionStorage.setItem("state", JSON.stringify(this.#state));
    } catch {
      sessionStorage.removeItem("state"); // it is larger than a browser keeps; better nothing than an older text
    }
  }

  /** Numbers have come. */
  counted() {
    this.#compare();
  }

  /** A request has failed; the pane says so in its place. */
  failed(error) {
    if (["down", "key", "changed"].includes(error.kind)) this.#forget();
    get("key").hidden = error.kind !== "key";
    if (error.kind !== "key") return;
    get("key").querySelector("p").textContent = `${error.message} The key is kept in this tab only.`;
    get("key").elements.key.focus();
  }

  /** Whoever answers next may be another. */
  #forget() {
    this.model = null;
    this.server.forget();
    get("model").textContent = "not connected";
  }

  say(text) {
    get("notice").textContent = text;
  }

  #listen() {
    get("key").addEventListener("submit", async (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", get("key").elements.key.value);
      get("key").reset();
      await this.connect();
    });
    get("compare").addEventListener("click", () => {
      this.#showPanes(this.panes.length === 1 ? 2 : 1);
      this.typed();
    });
    get("share").addEventListener("click", () => this.#share());
    get("theme").addEventListener("click", () => this.#theme());
    get("settings").addEventListener("input", () => this.typed());
    get("settings").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", () => this.#follow());
    addEventListener("scroll", () => this.details.follow(), { passive: true, capture: true });
    document.addEventListener("pointerdown", (event) => {
      if (!event.target.closest("#details, .cells")) this.details.hide();
    });
    const theme = localStorage.getItem("theme");
    if (theme) document.documentElement.dataset.theme = theme;
  }

  /** What was typed before a reload. */
  #recall() {
    try {
      const kept = sessionStorage.getItem("state");
      if (kept) this.#restore(JSON.parse(kept));
    } catch {
      sessionStorage.removeItem("state"); // of another version of this page
    }
  }

  /** A link may hold what somebody else typed. It is shown, and run by whoever opened it. */
  async #follow() {
    try {
      const state = await stateOf(location.hash);
      if (state) this.#restore(state);
    } catch {
      this.say("The link is damaged and cannot be read.");
    }
  }

  get #state() {
    const settings = {};
    for (const { name, value } of get("settings").elements) if (name) settings[name] = value;
    return { settings, panes: this.panes.map((pane) => pane.editor.state) };
  }

  #restore({ settings, panes }) {
    for (const [name, value] of Object.entries(settings)) {
      if (get("settings").elements[name]) get("settings").elements[name].value = value;
    }
    this.#showPanes(panes.length);
    panes.slice(0, 2).forEach((state, i) => this.panes[i].editor.set(state));
    this.#keep();
  }

  #showPanes(wanted) {
    while (this.panes.length > Math.max(1, wanted)) {
      const pane = this.panes.pop();
      pane.stop();
      pane.root.remove();
    }
    if (this.panes.length < Math.min(2, wanted)) {
      const pane = new Pane(this);
      pane.editor.set(this.panes[0].editor.state);
      this.panes.push(pane);
      get("panes").append(pane.root);
    }
    get("compare").ariaPressed = String(this.panes.length > 1);
    this.counted();
  }

  /** The sums of both panes, and their difference. */
  #compare() {
    const [left, right] = this.panes.map((pane) => pane.totals);
    get("comparison").hidden = !left || !right;
    if (!left || !right) return;
    const table = document.createElement("table");
    table.append(line("th", ["", "left", "right", "right − left"]));
    for (const [name, key, shown] of COMPARED) {
      const known = left[key] !== null && right[key] !== null;
      table.append(line("td", [name, ...[left[key], right[key], known ? right[key] - left[key] : null].map(shown)]));
    }
    get("comparison").replaceChildren(table);
  }

  async #share() {
    const link = await linkTo(this.#state);
    history.replaceState(null, "", link);
    try {
      await navigator.clipboard.writeText(link);
      this.say("The link is in the clipboard and the address bar. It contains the prompts and parameters, but no API key.");
    } catch {
      this.say("The link is in the address bar. It contains the prompts and parameters, but no API key.");
    }
  }

  #theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  }
}

/** The one box of details, whichever pane its token is in. */
class PageDetails extends Details {
  constructor(page) {
    super(
      get("details"),
      (run, index, alternative) => this.pane.branch(run, index, alternative),
      () => {
        const { pane, index } = this;
        pane.cells.focus(index);
        this.hide();
      },
    );
    this.page = page;
  }

  /** Shows a token of the run that a pane shows. */
  point(pane, index, cell) {
    this.pane = pane;
    this.show(pane.run, index, cell);
  }

  /** Hides it, if it is about a token of this pane. */
  hideOf(pane) {
    if (pane === this.pane) this.hide();
  }
}

function line(tag, [name, ...values]) {
  const row = document.createElement("tr");
  const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  row.append(cell(name ? "th" : "td", name), ...values.map((value) => cell(tag, value)));
  return row;
}

await new Page().open();
