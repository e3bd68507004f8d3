// All tokens of a run in a table that sorts and filters.

import { make } from "./dom.js";
import { ORIGINS, count, logprob, percent } from "./format.js";
import { entropy, margin } from "./scales.js";
import { decode, draw } from "./text.js";

const ROWS = 200; // shown at once; a button shows more

/** Heading, number to sort by, and what the cell shows. */
const COLUMNS = [
  ["position", (_, i) => i, (value) => count(value)],
  ["log-prob", (token) => token.logprob, logprob],
  ["probability", (token) => token.logprob, (value) => percent(Math.exp(value))],
  ["rank", (token) => token.rank, count],
  ["entropy ≥", (token) => (token.top.length ? entropy(token) : null), (value) => value.toFixed(3)],
  ["margin", margin, (value) => value.toFixed(3)],
];

export class TokenTable {
  /** A click on a row focuses the token's cell in `cells`. */
  constructor(root, cells) {
    this.root = root;
    this.cells = cells;
    this.tokens = [];
    this.sort = { column: 0, descending: false };
    this.limit = ROWS;
    root.addEventListener("toggle", () => this.#draw());
    for (const field of root.querySelectorAll("input, select")) field.addEventListener("input", () => this.#draw());
    root.querySelector(".further").addEventListener("click", () => {
      this.limit += ROWS;
      this.#draw();
    });
  }

  show(tokens) {
    this.tokens = tokens;
    this.limit = ROWS;
    this.#draw();
  }

  #draw() {
    if (!this.root.open) return;
    const head = make("tr", {}, make("th", { scope: "col" }, "token"), ...COLUMNS.map(([name], i) => this.#heading(name, i)));
    const indexes = this.#selected();
    const body = indexes.slice(0, this.limit).map((index) => this.#row(index));
    this.root.querySelector("table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
    this.root.querySelector(".matches").textContent = `${count(indexes.length)} of ${count(this.tokens.length)} tokens`;
    this.root.querySelector(".further").hidden = indexes.length <= this.limit;
  }

  /** Indexes of the tokens that match the filter, in order. */
  #selected() {
    const [text, origin] = [...this.root.querySelectorAll("input, select")].map((field) => field.value);
    const value = (index) => COLUMNS[this.sort.column][1](this.tokens[index], index);
    const matches = (token) => (!origin || token.origin === origin) && decode(token.bytes).toLowerCase().includes(text.toLowerCase());
    const indexes = this.tokens.map((_, i) => i).filter((i) => matches(this.tokens[i]));
    const sign = this.sort.descending ? -1 : 1;
    const values = new Map(indexes.map((i) => [i, value(i) ?? NaN]));
    // Tokens without a number come last.
    const known = indexes.filter((i) => !Number.isNaN(values.get(i))).sort((a, b) => sign * (values.get(a) - values.get(b)) || a - b);
    return [...known, ...indexes.filter((i) => Number.isNaN(values.get(i)))];
  }

  #heading(name, column) {
    const isSorted = this.sort.column === column;
    const direction = this.sort.descending ? "descending" : "ascending";
    const button = make("button", { type: "button" }, name, isSorted ? (this.sort.descending ? " ↓" : " ↑") : "");
    button.addEventListener("click", () => {
      this.sort = { column, descending: isSorted ? !this.sort.descending : false };
      this.#draw();
      this.root.querySelectorAll("thead button")[column].focus();
    });
    return make("th", { scope: "col", ariaSort: isSorted ? direction : "none" }, button);
  }

  #row(index) {
    const token = this.tokens[index];
    const name = make("span", { className: this.cells.cell(index)?.className.replace(/shown|pinned/g, "") ?? "cell" });
    draw(name, token.bytes);
    const button = make("button", { type: "button", title: ORIGINS[token.origin] }, name);
    button.addEventListener("click", () => this.cells.focus(index));
    const numbers = COLUMNS.map(([, value, format]) => {
      const number = value(token, index);
      return make("td", {}, typeof number === "number" ? format(number) : "–");
    });
    return make("tr", {}, make("th", { scope: "row" }, button), ...numbers);
  }
}
