// The details of one token in a box next to its cell: id, bytes, numbers, and the alternatives as buttons.

import { bar, make } from "./dom.js";
import { ORIGINS, count, logprob, percent } from "./format.js";
import { draw, escapeInvisible, hex, partOf, plain } from "./text.js";

const HIDE_AFTER = 250; // ms, for moving the pointer from the cell to the box

export class Details {
  constructor(element) {
    this.element = element;
    this.timer = null;
    this.pane = null; // of the token shown
    this.run = null;
    this.index = null;
    this.cell = null;
    element.addEventListener("pointerenter", () => clearTimeout(this.timer));
    element.addEventListener("pointerleave", () => this.hideSoon());
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Shows a token of the pane's current run next to its cell. */
  show(pane, index, cell) {
    clearTimeout(this.timer);
    Object.assign(this, { pane, run: pane.run, index, cell });
    this.element.hidden = false;
    this.#draw();
  }

  /** Redraws after tokens of a run from `from` on have received numbers. */
  update(run, from) {
    if (!this.element.hidden && this.run === run && this.index >= from) this.#draw();
  }

  hideSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.hide(), HIDE_AFTER);
  }

  hide() {
    clearTimeout(this.timer);
    this.element.hidden = true;
  }

  /** Hides the box if it shows a token of this pane. */
  hideFor(pane) {
    if (pane === this.pane) this.hide();
  }

  /** Focuses the first alternative. */
  enter() {
    this.element.hidden = false;
    this.element.querySelector("button")?.focus();
  }

  /** Moves the box with its cell when the page scrolls, and hides it when the cell is out of view. */
  follow() {
    if (this.element.hidden) return;
    const box = this.cell.getBoundingClientRect();
    const frame = this.cell.parentNode?.getBoundingClientRect();
    if (!frame || box.bottom < frame.top || box.top > frame.bottom) this.hide();
    else this.#place();
  }

  #draw() {
    const token = this.run.tokens[this.index];
    this.element.replaceChildren(this.#head(token), this.#facts(token), this.#list(token));
    this.#place();
  }

  #head(token) {
    const kind = `token ${count(this.index)}, ${ORIGINS[token.origin]}${token.special ? ", special" : ""}`;
    return make("div", { className: "head" }, name(token), make("span", { className: "kind" }, kind));
  }

  #facts(token) {
    const part = partOf(this.run.tokens, this.index);
    const facts = [
      ["id", String(token.id)],
      ["bytes", Array.from(token.bytes, hex).join(" ") || "none"],
    ];
    if (part) facts.push(["part of", escapeInvisible(part.character)]);
    if (typeof token.logprob === "number") {
      facts.push(["log-prob", logprob(token.logprob)]);
      facts.push(["probability", percent(Math.exp(token.logprob))]);
      facts.push(["rank", count(token.rank)]);
      if (token.allowedMass !== undefined) facts.push(["allowed mass", percent(token.allowedMass)]);
      if (token.forced) facts.push(["forced", "the grammar allowed no other token"]);
    } else {
      facts.push(["log-prob", token.logprob === null ? "none (first token)" : "pending"]);
    }
    return make("dl", { className: "facts" }, ...facts.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
  }

  #list(token) {
    const own = token.top.some((other) => other.id === token.id) ? [] : [token];
    const others = typeof token.logprob === "number" ? [...token.top, ...own] : [];
    const items = others.map((other) => this.#alternative(other, other.id === token.id));
    return make("ol", { className: "alternatives", ariaLabel: "Alternatives: choose one to continue from there" }, ...items);
  }

  #alternative(other, isOwn) {
    const { run, index } = this;
    const rank = count(other.rank);
    const probability = Math.exp(other.logprob);
    const title = isOwn ? "this token; generate again from here" : "continue with this token";
    const ariaLabel = `${plain(other.bytes)}, rank ${rank}, ${percent(probability)}: ${title}`;
    const button = make(
      "button",
      { type: "button", title, ariaLabel },
      make("span", { className: "rank" }, rank),
      name(other),
      bar(probability),
      make("span", { className: "p" }, percent(probability)),
      make("span", { className: "lp" }, logprob(other.logprob)),
    );
    button.addEventListener("click", () => this.pane.branch(run, index, other));
    return make("li", { className: isOwn ? "own" : "" }, button);
  }

  #key(event) {
    const buttons = [...this.element.querySelectorAll("button")];
    const current = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") {
      this.pane.cells.focus(this.index);
      this.hide();
    } else if (event.key === "ArrowDown") buttons[Math.min(current + 1, buttons.length - 1)]?.focus();
    else if (event.key === "ArrowUp") buttons[Math.max(current - 1, 0)]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Places the box below the cell, or above it if there is no room. On narrow screens, CSS overrides this. */
  #place() {
    const [box] = this.cell.getClientRects();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const view = document.documentElement;
    const below = box.bottom + height <= view.clientHeight || box.top < height;
    const left = Math.max(4, Math.min(box.left, view.clientWidth - width - 4));
    this.element.style.left = `${left}px`;
    this.element.style.top = `${below ? box.bottom : box.top - height}px`;
  }
}

function name(token) {
  const element = make("span", { className: token.special ? "cell special" : "cell" });
  draw(element, token.bytes);
  return element;
}
