// The summary below a run's cells: totals, the curve of log-probs, the most surprising tokens and a histogram of ranks.

import { Curve } from "./curve.js";
import { bar, make, row } from "./dom.js";
import { count, logprob, number, percent } from "./format.js";
import { draw } from "./text.js";
import { RANKS, mostSurprising, rankHistogram, templateTokens, totals } from "./totals.js";

const SURPRISING = 10;

/** Rows of the table of totals: label, key of totals(), format. */
const ROWS = [
  ["tokens", "tokens", count],
  ["log-prob, sum", "sum", number],
  ["log-prob, mean", "mean", number],
  ["perplexity", "perplexity", number],
  ["bits per byte", "bitsPerByte", number],
  ["rank 1", "first", (share) => (share === null ? "–" : percent(share))],
];

const COMPARED = ROWS.filter(([, key]) => key !== "mean" && key !== "first");

/** A table of the totals of two panes and their difference. */
export function comparison(left, right) {
  const rows = COMPARED.map(([label, key, format]) => {
    const difference = left[key] === null || right[key] === null ? null : right[key] - left[key];
    return row("td", [label, ...[left[key], right[key], difference].map(format)]);
  });
  return make("table", {}, row("th", ["", "left", "right", "right − left"]), ...rows);
}

export class Sums {
  /** `root` is the pane's element; a click on a token focuses its cell in `cells`. */
  constructor(root, cells) {
    this.root = root;
    this.cells = cells;
    this.curve = new Curve(root.querySelector(".curve-box"), cells);
    this.run = null;
    this.fold = root.querySelector(".fold input");
    this.fold.addEventListener("change", () => this.show(this.run));
  }

  show(run) {
    this.run = run;
    const isTemplate = run.prompt.messages ? templateTokens(run.tokens, run.prompt.messages) : [];
    this.root.querySelector(".fold").hidden = !isTemplate.includes(true);
    this.cells.element.classList.toggle("folded", this.fold.checked);
    isTemplate.forEach((flag, i) => this.cells.cell(i).classList.toggle("template", flag));
    this.#show(this.fold.checked ? run.tokens.filter((_, i) => !isTemplate[i]) : run.tokens);
    this.curve.show(run.tokens);
    this.#showSurprising(run.tokens);
    this.#showRanks(run.tokens);
  }

  /** Shows the totals of these tokens. */
  #show(tokens) {
    const generated = tokens.filter((token) => token.origin === "generated");
    const columns = [tokens.filter((token) => token.origin !== "generated"), generated, tokens].map(totals);
    const rows = ROWS.map(([label, key, format]) => row("td", [label, ...columns.map((sums) => format(sums[key]))]));
    this.root.querySelector(".totals tbody").replaceChildren(...rows);
  }

  /** Reuses the buttons of earlier calls, so that none loses the focus or a click while tokens arrive. */
  #showSurprising(tokens) {
    const list = this.root.querySelector(".surprising");
    const indexes = mostSurprising(tokens, SURPRISING);
    while (list.children.length > indexes.length) list.lastElementChild.remove();
    while (list.children.length < indexes.length) list.append(make("li", {}, make("button", { type: "button" })));
    indexes.forEach((index, i) => {
      const { bytes, logprob: value, rank } = tokens[index];
      const button = list.children[i].firstElementChild;
      const name = make("span", { className: this.cells.cell(index).className });
      draw(name, bytes);
      button.replaceChildren(name, ` ${logprob(value)}, rank ${count(rank)}`);
      button.onclick = () => this.cells.focus(index);
    });
  }

  #showRanks(tokens) {
    const counts = rankHistogram(tokens);
    const highest = Math.max(1, ...counts);
    const items = RANKS.map(({ name }, i) => {
      const label = make("span", { className: "label" }, `rank ${name}`);
      const size = make("span", { className: "size" }, count(counts[i]));
      return make("li", {}, label, bar(counts[i] / highest), size);
    });
    this.root.querySelector(".histogram").replaceChildren(...items);
  }
}
