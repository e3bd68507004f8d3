// The prompts of an answer as cells. They are scored when they are opened, with the most likely token after them.

import { Cells } from "./cells.js";
import { make } from "./dom.js";
import { Run } from "./run.js";
import { Work } from "./work.js";

const ALTERNATIVES = 10;

export class Prompts {
  /** `prompts` are {title, ids}. */
  constructor(page, prompts) {
    this.page = page;
    this.run = null;
    this.work = new Work(page, this);
    this.error = make("p", { className: "error", hidden: true });
    this.error.role = "alert";
    const box = make("div", { className: "cells", ariaLabel: "Tokens", ariaOrientation: "horizontal", dir: "auto" });
    box.role = "listbox";
    this.dock = make("div", { className: "dock" }); // of the details
    this.usesSide = false;
    this.cells = new Cells(box, this, page.details);
    this.buttons = prompts.map(({ title, ids }) => {
      const button = make("button", { type: "button", ariaPressed: "false" }, title);
      button.addEventListener("click", () => this.#show(button, ids));
      return button;
    });
    const nav = make("nav", { className: "branches", ariaLabel: "Prompts", hidden: prompts.length < 2 }, ...this.buttons);
    const summary = make("summary", {}, prompts.length < 2 ? "Tokens of the prompt" : `Tokens of the ${prompts.length} prompts`);
    this.root = make("details", {}, summary, nav, this.error, make("div", { className: "docked" }, this.dock, box));
    this.root.addEventListener("toggle", () => {
      if (!this.root.open) this.stop();
      else if (this.run === null) this.#show(this.buttons[0], prompts[0].ids);
    });
  }

  stop() {
    this.page.details.hideFor(this);
    if (this.work.running) this.run = null; // scored again when it is opened again
    this.work.stop();
  }

  /** Continues a prompt with another token, in the inspector. */
  branch(run, index, alternative) {
    this.page.inspect(run, index, alternative);
  }

  showError(error) {
    this.error.textContent = error?.message ?? "";
    this.error.hidden = error === null;
  }

  showBusy(busy) {
    this.root.ariaBusy = String(busy);
  }

  #show(chosen, ids) {
    for (const button of this.buttons) button.ariaPressed = String(button === chosen);
    this.page.details.hideFor(this);
    return this.work.run(async (signal) => {
      const run = new Run(this.page.server, "1: the prompt", { prompt_token_ids: ids });
      await run.add(ids, "prompt", signal);
      this.run = run;
      this.cells.show(run);
      const alternatives = Math.min(ALTERNATIVES, this.page.model.max_logprobs);
      const update = (from) => {
        if (run !== this.run) return;
        this.cells.update(from);
        this.page.details.update(run, from);
      };
      await run.fill({ temperature: 0, max_tokens: 1 }, alternatives, update, signal);
    });
  }
}
