// The questions of a decision as a form: a card for each, with its options or levels.

import { clone } from "./dom.js";

const OPTIONS = {
  choice: { key: "choices", name: "value", noun: "option" },
  score: { key: "levels", name: "label", noun: "level" },
};

export class Questions {
  /** `onEdit()` is called after questions or options are added or removed; `input` events report other edits. */
  constructor(element, onEdit) {
    this.element = element;
    this.onEdit = onEdit;
    this.cards = [];
  }

  get state() {
    return this.cards.map((card) => card.state);
  }

  set(states) {
    this.cards = [];
    this.element.replaceChildren();
    for (const state of states) this.#append(state);
  }

  /** The `questions` of a request. */
  get request() {
    return this.state.map(asRequest);
  }

  /** Adds an empty question of the same type as the last one. */
  add() {
    this.#append({ ...(this.state.at(-1) ?? { type: "predicate" }), name: "", instructions: "", options: [] });
    this.cards.at(-1).focus();
    this.onEdit();
  }

  /** Shows an error at the field of question `index` that `path` names. Returns whether there is such a question. */
  showError(index, path, message) {
    this.cards[index]?.showError(path, message);
    return index in this.cards;
  }

  clearErrors() {
    for (const card of this.cards) card.clearError();
  }

  #append(state) {
    const card = new Card(state, this.onEdit);
    card.root.querySelector(".remove").addEventListener("click", () => this.#remove(card));
    this.cards.push(card);
    this.element.append(card.root);
    this.#number();
  }

  #remove(card) {
    const index = this.cards.indexOf(card);
    this.cards.splice(index, 1);
    card.root.remove();
    this.#number();
    this.cards[Math.min(index, this.cards.length - 1)]?.focus();
    this.onEdit();
  }

  #number() {
    this.cards.forEach(({ root }, i) => {
      root.querySelector("legend").textContent = `Question ${i + 1}`;
      root.querySelector(".remove").ariaLabel = `Remove question ${i + 1}`;
    });
  }
}

/** One question. */
class Card {
  constructor({ type, name, instructions, options }, onEdit) {
    this.root = clone("question");
    this.fields = this.root.elements;
    this.onEdit = onEdit;
    this.options = this.root.querySelector(".options");
    Object.assign(this.fields.name, { value: name });
    Object.assign(this.fields.instructions, { value: instructions });
    this.fields.type.value = type in OPTIONS ? type : "predicate";
    for (const option of options) this.#append(option);
    this.root.querySelector(".add").addEventListener("click", () => {
      this.#append().focus();
      onEdit();
    });
    this.fields.type.addEventListener("change", () => this.#showType());
    this.#showType();
  }

  get state() {
    const options = Array.from(this.options.children, (row) => {
      const [value, description] = row.querySelectorAll("input");
      return { value: value.value, description: description.value };
    });
    return { type: this.fields.type.value, name: this.fields.name.value, instructions: this.fields.instructions.value, options };
  }

  focus() {
    this.fields.instructions.focus();
  }

  showError(path, message) {
    const error = this.root.querySelector(".error");
    Object.assign(error, { textContent: message, hidden: false });
    const [, index, key] = /^(?:choices|levels)\[(\d+)\](?:\.(\w+))?/.exec(path) ?? [];
    const row = this.options.children[index];
    const field = row ? row.querySelectorAll("input")[Number(key === "description")] : this.fields[path];
    if (field) field.ariaInvalid = "true";
    (field ?? this.fields.instructions).focus();
  }

  clearError() {
    this.root.querySelector(".error").hidden = true;
    for (const field of this.root.querySelectorAll("[aria-invalid]")) field.ariaInvalid = null;
  }

  #append({ value, description } = { value: "", description: "" }) {
    const row = clone("option");
    const inputs = row.querySelectorAll("input");
    inputs[0].value = value;
    inputs[1].value = description;
    row.querySelector("button").addEventListener("click", () => {
      const next = row.nextElementSibling ?? row.previousElementSibling;
      row.remove();
      this.#number();
      (next?.querySelector("input") ?? this.root.querySelector(".add")).focus();
      this.onEdit();
    });
    this.options.append(row);
    this.#number();
    return inputs[0];
  }

  #showType() {
    const kind = OPTIONS[this.fields.type.value];
    this.options.hidden = this.root.querySelector(".add").hidden = !kind;
    while (kind && this.options.children.length < 2) this.#append();
    this.#number();
  }

  #number() {
    const { noun } = OPTIONS[this.fields.type.value] ?? OPTIONS.choice;
    this.root.querySelector(".add").textContent = `Add ${noun}`;
    Array.from(this.options.children, (row, i) => {
      // Levels count from 0, as in scores.
      const name = `${noun} ${noun === "level" ? i : i + 1}`;
      const [value, description] = row.querySelectorAll("input");
      Object.assign(value, { ariaLabel: name, placeholder: name });
      description.ariaLabel = `Description of ${name}`;
      row.querySelector("button").ariaLabel = `Remove ${name}`;
    });
  }
}

function asRequest({ type, name, instructions, options }) {
  const question = { type, ...(name && { name }), instructions };
  const kind = OPTIONS[type];
  if (!kind) return question;
  const items = options.map(({ value, description }) => ({ [kind.name]: value, ...(description && { description }) }));
  return { ...question, [kind.key]: items };
}
