// The summary below a run's cells: totals, the log-prob curve, the most surprising tokens and a histogram of ranks.

import { bar, make, row } from "./dom.js";
import { count, logprob, number, percent } from "./format.js";
import { draw } from "./text.js";
import { RANKS, curve, mostSurprising, rankHistogram, totals } from "./totals.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 80;
const DEEPEST = -12; // nats: lower log-probs are drawn here
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
  }

  show({ tokens }) {
    const generated = tokens.filter((token) => token.origin === "generated");
    const columns = [tokens.filter((token) => token.origin !== "generated"), generated, tokens].map(totals);
    const rows = ROWS.map(([label, key, format]) => row("td", [label, ...columns.map((sums) => format(sums[key]))]));
    this.root.querySelector(".totals tbody").replaceChildren(...rows);
    this.#showCurve(tokens);
    this.#showSurprising(tokens);
    this.#showRanks(tokens);
  }

  /** Draws the log-prob curve. A click focuses the least likely token of the stretch that was clicked. */
  #showCurve(tokens) {
    const svg = this.root.querySelector(".curve");
    const points = curve(tokens, WIDTH / 2);
    const x = (i) => (points.length > 1 ? (i * WIDTH) / (points.length - 1) : WIDTH / 2);
    const y = (value) => (HEIGHT * Math.max(value, DEEPEST)) / DEEPEST;
    const line = (key) => points.map((point, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(point[key]).toFixed(1)}`).join("");
    const title = shape("title", {}, `Log-prob per token, from 0 (top) to ${DEEPEST} or less (bottom)`);
    const grid = [-2, -4, -6, -8, -10].map((value) => shape("path", { class: "grid", d: `M0 ${y(value)}H${WIDTH}` }));
    const lines = ["low", "mean"].map((key) => shape("path", { class: key, d: line(key) }));
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.replaceChildren(title, ...grid, ...lines);
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      return points[Math.round(((event.clientX - box.left) / box.width) * (points.length - 1))];
    };
    svg.onclick = (event) => points.length && this.cells.focus(nearest(event).index);
    svg.onpointermove = (event) => {
      if (points.length) title.textContent = `token ${count(nearest(event).index)}: ${logprob(nearest(event).low)}`;
    };
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

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
