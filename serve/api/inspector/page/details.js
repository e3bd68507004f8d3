// What is known of one token, beside its cell: id, bytes, numbers, and the alternatives as bars to click.

import { count, logprob, percent } from "./format.js";
import { draw, escaped, hex, partOf, plain } from "./text.js";

const HIDE_AFTER = 250; // ms: the pointer's way from a cell to the details

export class Details {
  /** `onBranch(run, index, alternative)` is told of the alternative that somebody takes; `onClose()` of Escape. */
  constructor(element, onBranch, onClose) {
    this.element = element;
    this.onBranch = onBranch;
    this.timer = null;
    this.run = null; // what is shown of which run, and the cell beside which it stands
    this.index = null;
    this.cell = null;
    element.addEventListener("pointerenter", () => this.stay());
    element.addEventListener("pointerleave", () => this.leave());
    element.addEventListener("keydown", (event) => this.#key(event, onClose));
  }

  /** Shows token `index` of a run below its cell. */
  show(run, index, cell) {
    this.stay();
    Object.assign(this, { run, index, cell });
    this.element.hidden = false;
    this.#draw();
  }

  /** Tokens of a run from `from` on have got numbers. */
  changed(run, from) {
    if (!this.element.hidden && this.run === run && this.index >= from) this.#draw();
  }

  #draw() {
    const { run, index, cell } = this;
    const token = run.tokens[index];
    this.element.replaceChildren(this.#head(token, index), this.#facts(run, index), this.#list(run, index));
    this.#place(cell);
  }

  /** The pointer is on its way elsewhere. */
  leave() {
    this.stay();
    this.timer = setTimeout(() => this.hide(), HIDE_AFTER);
  }

  /** The pointer has come. */
  stay() {
    clearTimeout(this.timer);
  }

  hide() {
    this.stay();
    this.element.hidden = true;
  }

  /** Gives the first alternative the focus. */
  enter() {
    this.element.hidden = false;
    this.element.querySelector("button")?.focus();
  }

  /** The page has scrolled: the details go with their cell, or with it out of sight. */
  follow() {
    if (this.element.hidden) return;
    const box = this.cell.getBoundingClientRect();
    const frame = this.cell.parentNode?.getBoundingClientRect();
    if (!frame || box.bottom < frame.top || box.top > frame.bottom) this.hide();
    else this.#place(this.cell);
  }

  #head(token, index) {
    const head = make("div", "head");
    const shown = make("span", `cell ${token.special ? "special" : ""}`);
    draw(shown, token.bytes);
    const kind = { prompt: "prompt", branch: "chosen by you", generated: "generated" }[token.origin];
    head.append(shown, make("span", "kind", `token ${count(index)}, ${kind}${token.special ? ", special" : ""}`));
    return head;
  }

  #facts(run, index) {
    const token = run.tokens[index];
    const part = partOf(run.tokens, index);
    const facts = [
      ["id", String(token.id)],
      ["bytes", Array.from(token.bytes, hex).join(" ") || "none"],
    ];
    if (part) facts.push(["part of", escaped(part.character)]);
    if (typeof token.logprob === "number") {
      facts.push(["log-prob", logprob(token.logprob)]);
      facts.push(["probability", percent(Math.exp(token.logprob))]);
      facts.push(["rank", count(token.rank)]);
    } else {
      facts.push(["log-prob", token.logprob === null ? "none (first token)" : "pending"]);
    }
    const list = make("dl", "facts");
    for (const [name, value] of facts) list.append(make("dt", "", name), make("dd", "", value));
    return list;
  }

  #list(run, index) {
    const token = run.tokens[index];
    const list = make("ol", "alternatives");
    list.ariaLabel = "Alternatives: choose one to continue from there";
    const own = token.top.some((other) => other.id === token.id) ? [] : [token];
    for (const other of typeof token.logprob === "number" ? [...token.top, ...own] : []) {
      list.append(this.#alternative(run, index, other, other.id === token.id));
    }
    return list;
  }

  #alternative(run, index, other, isOwn) {
    const item = make("li", isOwn ? "own" : "");
    const button = make("button", "");
    button.type = "button";
    const probability = Math.exp(other.logprob);
    const bar = make("span", "bar");
    bar.style.setProperty("--share", probability);
    const name = make("span", `cell ${other.special ? "special" : ""}`);
    draw(name, other.bytes);
    const numbers = [make("span", "rank", count(other.rank)), name, bar, make("span", "p", percent(probability))];
    button.append(...numbers, make("span", "lp", logprob(other.logprob)));
    const what = isOwn ? "this token; generate again from here" : "continue with this token";
    button.ariaLabel = `${plain(other.bytes)}, rank ${count(other.rank)}, ${percent(probability)}: ${what}`;
    button.title = what;
    button.addEventListener("click", () => this.onBranch(run, index, other));
    item.append(button);
    return item;
  }

  #key(event, onClose) {
    const buttons = [...this.element.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") onClose();
    else if (event.key === "ArrowDown") buttons[Math.min(at + 1, buttons.length - 1)]?.focus();
    else if (event.key === "ArrowUp") buttons[Math.max(at - 1, 0)]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Below the cell, or above it where there is no room; narrow screens have a place of their own for it (CSS). */
  #place(cell) {
    const [box] = cell.getClientRects();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const view = document.documentElement;
    const below = box.bottom + height <= view.clientHeight || box.top < height;
    const left = Math.max(4, Math.min(box.left, view.clientWidth - width - 4));
    this.element.style.left = `${left}px`;
    this.element.style.top = `${below ? box.bottom : box.top - height}px`;
  }
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className.trim();
  if (text !== undefined) element.textContent = text;
  return element;
}
