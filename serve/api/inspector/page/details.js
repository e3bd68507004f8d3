// The details of one token in a docked panel: id, bytes, numbers, and a table of alternatives to continue with.

import { bar, make } from "./dom.js";
import { ORIGINS, count, logprob, percent } from "./format.js";
import { Sampling } from "./sampled.js";
import { draw, escapeInvisible, hex, partOf, plain } from "./text.js";

const COLUMNS = ["rank", "token", "probability", "cumulative", "log-prob", "id", "bytes"];
const SAMPLED = 3; // position of the column with the sampled distribution, if it is shown

export class Details {
  /** `side` is the place of the panel on wide screens; `narrow` a MediaQueryList. */
  constructor(element, side, narrow) {
    this.element = element;
    this.side = side;
    this.narrow = narrow;
    this.pinned = false;
    this.pane = null; // of the token shown
    this.run = null;
    this.index = null;
    this.cell = null;
    this.sampling = new Sampling(() => this.#redrawTable());
    element.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.unpin());
    narrow.addEventListener("change", () => this.pane && this.#dock());
  }

  /** Shows the token under the pointer, unless another one is pinned, or the panel would move the text. */
  preview(pane, index, cell) {
    if (!this.pinned && !this.narrow.matches) this.show(pane, index, cell);
  }

  /** Shows a token and keeps it while the pointer moves over others. */
  pin(pane, index, cell) {
    this.pinned = true;
    this.show(pane, index, cell);
  }

  /** Shows a token of the pane's current run. A pin moves to it. */
  show(pane, index, cell) {
    const before = cell.getBoundingClientRect().top;
    this.#mark(false);
    Object.assign(this, { pane, run: pane.run, index, cell });
    this.#dock();
    this.element.hidden = false;
    this.#draw();
    if (this.element.parentNode !== this.side) this.#uncover(before);
  }

  /** Lets the panel show the token under the pointer again. On narrow screens it closes. */
  unpin() {
    if (!this.pinned) return;
    this.pinned = false;
    if (this.narrow.matches) this.hide();
    else this.#draw();
  }

  /** Redraws after tokens of a run from `from` on have received numbers. */
  update(run, from) {
    if (!this.element.hidden && this.run === run && this.index >= from) this.#draw();
  }

  hide() {
    this.pinned = false;
    this.#mark(false);
    this.element.hidden = true;
  }

  /** Hides the panel if it shows a token of this pane. */
  hideFor(pane) {
    if (pane === this.pane) this.hide();
  }

  /** Pins the token and focuses its first alternative. */
  enter() {
    this.pinned = true;
    this.#draw();
    this.element.querySelector(".alternatives button")?.focus();
  }

  /** Moves the panel to its place: beside the panes, or at the text. */
  #dock() {
    const place = this.narrow.matches || !this.pane.usesSide ? this.pane.dock : this.side;
    if (this.element.parentNode !== place) place.prepend(this.element);
  }

  /** Scrolls so that the token stays at `top` when the panel opens, and never under the panel. */
  #uncover(top) {
    scrollBy({ top: this.cell.getBoundingClientRect().top - top, behavior: "instant" });
    const gap = this.cell.getClientRects()[0].top - this.element.getBoundingClientRect().bottom;
    if (this.narrow.matches && gap < 0) scrollBy({ top: gap - 8, behavior: "instant" });
  }

  #mark(shown) {
    this.cell?.classList.toggle("shown", shown);
    this.cell?.classList.toggle("pinned", shown && this.pinned);
  }

  #draw() {
    const token = this.run.tokens[this.index];
    this.#mark(true);
    const isScored = typeof token.logprob === "number";
    const parts = isScored ? [this.sampling.root, this.#table(token)] : [];
    this.element.replaceChildren(this.#head(token), this.#facts(token), ...parts);
  }

  #head(token) {
    const kind = `token ${count(this.index)}, ${ORIGINS[token.origin]}${token.special ? ", special" : ""}`;
    const close = make("button", { type: "button", className: "unpin", hidden: !this.pinned, title: "Escape" }, "Unpin");
    close.addEventListener("click", () => this.unpin());
    const tree = make("button", { type: "button", className: "grow", hidden: !this.pane.tree || token.top.length === 0 }, "Tree");
    tree.title = "Tree of continuations from here";
    tree.addEventListener("click", () => this.pane.tree.open(this.run, this.index));
    return make("div", { className: "head" }, name(token), make("span", { className: "kind" }, kind), tree, close);
  }

  #facts(token) {
    const part = partOf(this.run.tokens, this.index);
    const facts = [
      ["id", String(token.id)],
      ["bytes", Array.from(token.bytes, hex).join(" ") || "none"],
    ];
    if (part) facts.push(["part of", escapeInvisible(part.character)]);
    if (typeof token.logprob === "number") {
      facts.push(["rank", count(token.rank)]);
      facts.push(["probability", percent(Math.exp(token.logprob))]);
      facts.push(["log-prob", logprob(token.logprob)]);
      if (token.allowedMass !== undefined) facts.push(["allowed mass", percent(token.allowedMass)]);
      if (token.forced) facts.push(["forced", "the grammar allowed no other token"]);
    } else {
      facts.push(["log-prob", token.logprob === null ? "none (first token)" : "pending"]);
    }
    return make("dl", { className: "facts" }, ...facts.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
  }

  /** The alternatives in a table that scrolls; the row of the token itself stays in view. */
  #table(token) {
    const isListed = token.top.some((other) => other.id === token.id);
    const others = isListed ? token.top : [...token.top, token];
    const sampled = this.sampling.of(others.map((other) => other.logprob));
    let sum = 0;
    const rows = others.map((other, i) => {
      sum += Math.exp(other.logprob);
      return this.#alternative(other, other === token ? null : sum, token, sampled?.[i]);
    });
    const columns = sampled ? COLUMNS.toSpliced(SAMPLED, 0, "sampled") : COLUMNS;
    const head = make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column)));
    const table = make("table", { className: "alternatives" }, make("thead", {}, head), make("tbody", {}, ...rows));
    table.createCaption().textContent = `${count(token.top.length)} most likely; choose one to continue with it`;
    return make("div", { className: "scroller", tabIndex: 0, role: "group", ariaLabel: "Alternatives" }, table);
  }

  #redrawTable() {
    this.element.querySelector(".scroller")?.replaceWith(this.#table(this.run.tokens[this.index]));
  }

  /**
   * A row. `cumulative` is the probability of this token and of all that are more likely, null if not known; `sampled` that of
   * drawing it, unless it is undefined.
   */
  #alternative(other, cumulative, token, sampled) {
    const { run, index } = this;
    const isOwn = other.id === token.id;
    const rank = count(other.rank);
    const probability = percent(Math.exp(other.logprob));
    const title = isOwn ? "this token; generate again from here" : "continue with this token";
    const ariaLabel = `${plain(other.bytes)}, rank ${rank}, ${probability}: ${title}`;
    const button = make("button", { type: "button", title, ariaLabel }, name(other));
    const bytes = Array.from(other.bytes, hex).join(" ");
    const cells = [
      rank,
      button,
      make("span", { className: "p" }, bar(Math.exp(other.logprob)), probability),
      cumulative === null ? "–" : percent(Math.min(1, cumulative)),
      logprob(other.logprob),
      String(other.id),
      make("code", { title: bytes }, bytes),
    ];
    if (sampled !== undefined) cells.splice(SAMPLED, 0, make("span", { className: "p" }, bar(sampled), percent(sampled)));
    const row = make("tr", { className: `${isOwn ? "own" : ""} ${sampled === 0 ? "excluded" : ""}` }, ...cells.map((cell) => make("td", {}, cell)));
    row.addEventListener("click", () => this.pane.branch(run, index, other));
    return row;
  }

  #key(event) {
    const buttons = [...this.element.querySelectorAll(".alternatives button")];
    const current = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") {
      const { pane, index } = this;
      pane.cells.focus(index);
      this.unpin();
    } else if (current < 0) return;
    else if (event.key === "ArrowDown") buttons[Math.min(current + 1, buttons.length - 1)].focus();
    else if (event.key === "ArrowUp") buttons[Math.max(current - 1, 0)].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

function name(token) {
  const element = make("span", { className: token.special ? "cell special" : "cell" });
  draw(element, token.bytes);
  return element;
}
