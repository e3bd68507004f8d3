// The curve of log-probs along a text, with axes. A click goes to a token; dragging selects a range of tokens.

import { make } from "./dom.js";
import { count, logprob, number } from "./format.js";
import { curve, totals } from "./totals.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 80;
const DEEPEST = -12; // nats: lower log-probs are drawn here
const DRAG = 4; // px: less is a click

export class Curve {
  /** `root` contains the picture, its axes and the line for the range; `cells` are those of the tokens. */
  constructor(root, cells) {
    this.root = root;
    this.cells = cells;
    this.svg = root.querySelector("svg");
    this.band = shape("rect", { class: "band", y: 0, height: HEIGHT, width: 0 });
    this.tokens = [];
    this.points = [];
    this.start = null; // clientX of a drag
    this.svg.addEventListener("pointerdown", (event) => this.#press(event));
    this.svg.addEventListener("pointermove", (event) => this.#move(event));
    this.svg.addEventListener("pointerup", (event) => this.#release(event));
  }

  show(tokens) {
    this.tokens = tokens;
    this.points = curve(tokens, WIDTH / 2);
    const { points } = this;
    const x = (i) => (points.length > 1 ? (i * WIDTH) / (points.length - 1) : WIDTH / 2);
    const y = (value) => (HEIGHT * Math.max(value, DEEPEST)) / DEEPEST;
    const line = (key) => points.map((point, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(point[key]).toFixed(1)}`).join("");
    this.title = shape("title", {}, `Log-prob per token, from 0 (top) to ${DEEPEST} or less (bottom)`);
    const grid = [-3, -6, -9].map((value) => shape("path", { class: "grid", d: `M0 ${y(value)}H${WIDTH}` }));
    const lines = ["low", "mean"].map((key) => shape("path", { class: key, d: line(key) }));
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.replaceChildren(this.title, this.band, ...grid, ...lines);
    const marks = points.length ? [points[0], points[points.length >> 1], points.at(-1)] : [];
    this.root.querySelector(".x-axis").replaceChildren(...marks.map(({ index }) => make("span", {}, count(index))));
    this.select(null);
  }

  /** Marks tokens `from` to `to` and shows their totals; null marks none. */
  select(range) {
    this.root.querySelector(".range").textContent = range ? describe(this.tokens.slice(range.from, range.to + 1), range) : "";
    if (!range) this.band.setAttribute("width", 0);
    for (const cell of this.cells.element.querySelectorAll(".brushed")) cell.classList.remove("brushed");
    for (let i = range?.from; i <= range?.to; i++) this.cells.cell(i).classList.add("brushed");
  }

  #press(event) {
    if (this.points.length === 0 || event.button !== 0) return;
    this.start = event.clientX;
    this.svg.setPointerCapture(event.pointerId);
  }

  #move(event) {
    if (this.points.length === 0) return;
    const { index, low } = this.points[this.#position(event.clientX)];
    this.title.textContent = `token ${count(index)}: ${logprob(low)}`;
    if (this.start === null) return;
    const { left, width } = this.svg.getBoundingClientRect();
    const [from, to] = [this.start, event.clientX].map((x) => (WIDTH * (x - left)) / width).sort((a, b) => a - b);
    this.band.setAttribute("x", from);
    this.band.setAttribute("width", to - from);
  }

  #release(event) {
    if (this.start === null) return;
    const [from, to] = [this.start, event.clientX].map((x) => this.points[this.#position(x)].index).sort((a, b) => a - b);
    const isClick = Math.abs(event.clientX - this.start) < DRAG;
    this.start = null;
    this.select(isClick ? null : { from, to });
    if (isClick) this.cells.focus(from);
  }

  /** The position in `points` below a place of the screen. */
  #position(clientX) {
    const { left, width } = this.svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (clientX - left) / width));
    return Math.round(share * (this.points.length - 1));
  }
}

function describe(tokens, { from, to }) {
  const { sum, mean, perplexity } = totals(tokens);
  return `Tokens ${count(from)} to ${count(to)}: log-prob ${number(sum)}, mean ${number(mean)}, perplexity ${number(perplexity)}`;
}

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
