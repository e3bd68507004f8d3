// A tree of continuations: each token opens into those that may follow it, with the probability of the path.

import { bar, make } from "./dom.js";
import { percent } from "./format.js";
import { draw, plain } from "./text.js";
import { Work } from "./work.js";

const BRANCHES = 8; // alternatives of a node

export class Tree {
  constructor(page, root) {
    this.page = page;
    this.root = root;
    this.work = new Work(page, this);
    this.list = root.querySelector("ul");
    root.querySelector("button").addEventListener("click", () => this.close());
  }

  /** Begins at token `index` of a run, with its alternatives. */
  open(run, index) {
    Object.assign(this, { run, index });
    const prefix = run.tokens.slice(0, index).map((token) => token.id);
    this.root.hidden = false;
    this.showError(null);
    this.list.replaceChildren(...this.#nodes(run.tokens[index].top, prefix, 0));
    this.root.scrollIntoView({ block: "nearest" });
    this.list.querySelector("button")?.focus({ preventScroll: true });
  }

  close() {
    this.work.stop();
    this.root.hidden = true;
  }

  showError(error) {
    this.root.querySelector(".error").textContent = error?.message ?? "";
    this.root.querySelector(".error").hidden = error === null;
  }

  showBusy(busy) {
    this.root.ariaBusy = String(busy);
  }

  #nodes(tokens, prefix, sum) {
    return tokens.slice(0, BRANCHES).map((token) => this.#node(token, prefix, sum + token.logprob));
  }

  /** A token after `prefix`; `sum` is the log-prob of the path up to it. */
  #node(token, prefix, sum) {
    const name = make("span", { className: token.special ? "cell special" : "cell" });
    draw(name, token.bytes);
    const own = Math.exp(token.logprob);
    const label = `${plain(token.bytes)}, ${percent(own)}, path ${percent(Math.exp(sum))}`;
    const button = make("button", { type: "button", ariaExpanded: "false", ariaLabel: label });
    button.append(name, bar(own), make("span", {}, percent(own)), make("span", { className: "path" }, `path ${percent(Math.exp(sum))}`));
    const item = make("li", {}, button);
    button.addEventListener("click", () => this.#toggle(item, button, [...prefix, token.id], sum));
    return item;
  }

  #toggle(item, button, ids, sum) {
    const children = item.querySelector("ul");
    if (children) {
      children.hidden = !children.hidden;
      button.ariaExpanded = String(!children.hidden);
      return;
    }
    return this.work.run(async (signal) => {
      const next = await this.run.following(ids, Math.min(BRANCHES, this.page.model.max_logprobs), signal);
      item.append(make("ul", {}, ...this.#nodes(next, ids, sum)));
      button.ariaExpanded = "true";
    });
  }
}
