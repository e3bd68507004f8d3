// The tokens of a run as cells in a text. One of them can have the focus; arrow keys move it.

import { make } from "./dom.js";
import { draw, escapeInvisible, partOf, plain } from "./text.js";
import { differenceStep, differences, steps } from "./scales.js";
import { describe } from "./format.js";

export class Cells {
  /** Shows tokens of `view` in `details`: those under the pointer, with the focus, and clicked. */
  constructor(element, view, details) {
    this.element = element;
    this.view = view;
    this.details = details;
    this.run = null;
    this.current = 0;
    this.indexes = new WeakMap(); // cell -> index
    element.addEventListener("pointerover", (event) => this.#over(event));
    element.addEventListener("focusin", (event) => this.#focused(event));
    element.addEventListener("click", (event) => this.#clicked(event));
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  show(run) {
    this.run = run;
    this.current = 0;
    this.element.replaceChildren();
    this.update(0);
  }

  /** Draws tokens from `start` on, which are new or have received numbers. */
  update(start) {
    const { tokens } = this.run;
    const added = document.createDocumentFragment();
    // New bytes may complete a character that earlier tokens begin.
    for (let i = Math.max(0, start - 3); i < tokens.length; i++) {
      const cell = this.element.children[i] ?? added.appendChild(this.#make(i));
      this.#paint(cell, i);
    }
    this.element.append(added);
  }

  /** Colors the difference of log-probs to another run's; none for null. */
  compare(other) {
    const found = other ? differences(this.run.tokens, other.tokens) : [];
    this.run.tokens.forEach((_, i) => {
      const cell = this.cell(i);
      cell.className = cell.className.replace(/ d\d/, "");
      if (found[i] !== undefined) cell.className += ` ${differenceStep(found[i])}`;
    });
  }

  cell(index) {
    return this.element.children[index];
  }

  /** Moves the focus to a token and makes it visible. */
  focus(index) {
    const target = this.cell(Math.min(Math.max(index, 0), this.run.tokens.length - 1));
    if (!target) return;
    target.scrollIntoView({ block: "nearest" });
    target.focus({ preventScroll: true });
  }

  #make(index) {
    const cell = make("span", { tabIndex: index === this.current ? 0 : -1 });
    cell.setAttribute("role", "option");
    this.indexes.set(cell, index);
    draw(cell, this.run.tokens[index].bytes);
    return cell;
  }

  #paint(cell, index) {
    const token = this.run.tokens[index];
    const classes = ["cell", token.origin];
    if (token.special) classes.push("special");
    if (typeof token.logprob === "number") classes.push(...steps(token));
    else classes.push(token.logprob === null ? "first" : "waiting");
    if (token.forced) classes.push("forced");
    cell.className = classes.join(" ");
    const part = partOf(this.run.tokens, index);
    if (part?.last) cell.dataset.whole = escapeInvisible(part.character);
    cell.ariaLabel = `${plain(token.bytes)}: ${describe(token)}`;
  }

  #indexOf(node) {
    return this.indexes.get(node.closest?.(".cell")) ?? -1;
  }

  #over(event) {
    if (event.pointerType !== "mouse") return; // touching a cell focuses it
    const index = this.#indexOf(event.target);
    if (index >= 0) this.details.preview(this.view, index, this.cell(index));
  }

  #focused(event) {
    const index = this.#indexOf(event.target);
    if (index < 0) return;
    const cell = this.cell(index);
    Object.assign(this.cell(this.current) ?? {}, { tabIndex: -1, ariaSelected: "false" });
    Object.assign(cell, { tabIndex: 0, ariaSelected: "true" });
    this.current = index;
    this.details.show(this.view, index, cell);
  }

  #clicked(event) {
    const index = this.#indexOf(event.target);
    if (index >= 0) this.details.pin(this.view, index, this.cell(index));
  }

  #key(event) {
    const last = this.run ? this.run.tokens.length - 1 : 0;
    const moves = {
      ArrowRight: () => this.current + 1,
      ArrowLeft: () => this.current - 1,
      ArrowDown: () => this.#line(1),
      ArrowUp: () => this.#line(-1),
      Home: () => 0,
      End: () => last,
      PageDown: () => this.current + 50,
      PageUp: () => this.current - 50,
    };
    if (event.key === "Enter") this.details.enter();
    else if (moves[event.key]) this.focus(moves[event.key]());
    else return;
    event.preventDefault();
  }

  /** The token nearest below (1) or above (-1) the current one. */
  #line(direction) {
    const box = (index) => this.cell(index).getClientRects()[0]; // the first one: a line break ends in the next line
    const middle = ({ left, width }) => left + width / 2;
    const start = box(this.current);
    let best = this.current;
    let line = null; // top of the line that is searched
    for (let i = this.current + direction; this.cell(i); i += direction) {
      const other = box(i);
      if (Math.abs(other.top - start.top) < start.height / 2) continue;
      if (line !== null && Math.abs(other.top - line) > other.height / 2) break;
      const nearer = Math.abs(middle(other) - middle(start)) < Math.abs(middle(box(best)) - middle(start));
      if (line === null || nearer) best = i;
      line = other.top;
    }
    return best;
  }
}
