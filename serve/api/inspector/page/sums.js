// What stands below the cells of a run: sums, the curve, the most surprising tokens, ranks.

import { drawCurve, drawHistogram } from "./charts.js";
import { count, logprob, number, percent } from "./format.js";
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

export class Sums {
  /** `root` is the pane; a click on a token has `cells` go to it. */
  constructor(root, cells) {
    this.root = root;
    this.cells = cells;
  }

  show({ tokens }) {
    const generated = tokens.filter((token) => token.origin === "generated");
    const columns = [tokens.filter((token) => token.origin !== "generated"), generated, tokens].map(totals);
    const rows = ROWS.map(([name, value]) => row([name, ...columns.map(value)]));
    this.#part(".totals tbody").replaceChildren(...rows);
    drawCurve(this.#part(".curve"), tokens, (index) => this.cells.focus(index));
    drawHistogram(this.#part(".histogram"), tokens);
    this.#showSurprising(tokens);
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }

  /** Buttons stay the same ones while others come to stand on them: focus and clicks are not lost. */
  #showSurprising(tokens) {
    const list = this.#part(".surprising");
    const indexes = mostSurprising(tokens, SURPRISING);
    while (list.children.length > indexes.length) list.lastElementChild.remove();
    indexes.forEach((index, place) => {
      const { bytes, logprob: value, rank } = tokens[index];
      const button = (list.children[place] ?? list.appendChild(this.#item())).firstElementChild;
      const name = document.createElement("span");
      name.className = this.cells.cell(index).className;
      draw(name, bytes);
      button.replaceChildren(name, ` ${logprob(value)}, rank ${count(rank)}`);
      button.onclick = () => this.cells.focus(index);
    });
  }

  #item() {
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("button"), { type: "button" }));
    return item;
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
