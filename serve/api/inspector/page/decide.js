// The tab of decisions: state, questions and scoring, and below or beside them the answers.

import { answerView, promptTitles } from "./answers.js";
import { STATE, asCurl, asJson, asPython } from "./code.js";
import { clone } from "./dom.js";
import { count } from "./format.js";
import { Prompts } from "./prompts.js";
import { Questions } from "./questions.js";
import { ServerError } from "./api.js";
import { Work } from "./work.js";

const FIELDS = ["kind", "state", "scoring", "normalize", "permutations", "temperature"];
const PLACEHOLDERS = {
  text: "What the questions are about",
  json: '{"subject": "Refund", "days": 12}',
  items: '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]',
};

export class Decide {
  constructor(page) {
    this.page = page;
    this.root = clone("decision");
    this.form = this.root.querySelector("form");
    this.fields = this.form.elements;
    this.work = new Work(page, this);
    this.prompts = []; // of the answers that are shown
    this.error = null;
    this.questions = new Questions(this.#part(".questions"), () => page.onEdit());
    this.questions.set([{ type: "predicate", name: "", instructions: "", options: [] }]);
    this.#listen();
    this.#showFields();
  }

  get state() {
    const fields = Object.fromEntries(FIELDS.map((name) => [name, this.fields[name].value]));
    return { ...fields, questions: this.questions.state };
  }

  set({ questions, ...fields }) {
    for (const name of FIELDS) this.fields[name].value = fields[name];
    this.questions.set(questions);
    this.#showFields();
    this.work.stop();
    this.#showAnswers([], []);
    this.#part(".status").textContent = "";
    this.#part(".copied").textContent = "";
    this.#part(".code").hidden = true;
    this.showError(null);
  }

  /** Ends an error of these kinds. */
  forgive(kinds) {
    if (kinds.includes(this.error?.kind)) this.showError(null);
  }

  showError(error) {
    this.error = error;
    this.questions.clearErrors();
    for (const name of FIELDS) if (this.fields[name].ariaInvalid) this.fields[name].ariaInvalid = null;
    for (const element of this.root.querySelectorAll(".state-error, .general")) element.hidden = true;
    if (error === null) return;
    const param = error.param ?? "";
    const [, index, path] = /^questions\[(\d+)\]\.?(.*)/.exec(param) ?? [];
    if (index !== undefined && this.questions.showError(Number(index), path, error.message)) return;
    const name = /^input\b/.test(param) ? "state" : param;
    Object.assign(this.#part(name === "state" ? ".state-error" : ".general"), { textContent: error.message, hidden: false });
    if (!FIELDS.includes(name)) return;
    this.fields[name].ariaInvalid = "true";
    this.fields[name].focus();
  }

  showBusy(busy) {
    this.root.ariaBusy = String(busy);
    this.#part(".stop").hidden = !busy;
    if (busy) this.#part(".status").textContent = "";
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }

  #listen() {
    const click = (selector, action) => this.#part(selector).addEventListener("click", action);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.form.addEventListener("input", () => {
      this.#showFields();
      this.forgive(["refused"]);
      this.page.onEdit();
    });
    click(".add-question", () => this.questions.add());
    click(".stop", () => this.work.stop());
    click(".curl", () => this.#copy(asCurl, "curl command"));
    click(".python", () => this.#copy(asPython, "Python program"));
  }

  /** Shows the fields that apply to the chosen scoring. */
  #showFields() {
    const { kind, scoring, normalize, permutations, state } = this.fields;
    normalize.parentElement.hidden = scoring.value !== "sequences";
    permutations.parentElement.hidden = permutations.disabled = scoring.value !== "permutations";
    state.placeholder = PLACEHOLDERS[kind.value];
  }

  /** The fields of a request and the state as JSON, which is null for a text. Throws ServerError if it is not JSON. */
  #request() {
    const { kind, state, scoring, normalize, permutations, temperature, questions } = { ...this.state, questions: this.questions.request };
    const inputs = { text: state, json: [{ role: "user", content: [{ type: "input_json", data: STATE }] }], items: STATE };
    const body = { input: inputs[kind], questions };
    if (scoring) body.scoring = scoring;
    if (scoring === "sequences" && normalize) body.normalize = normalize;
    if (scoring === "permutations" && permutations) body.permutations = Number(permutations);
    if (temperature) body.temperature = Number(temperature);
    if (kind === "text") return { body, state: null };
    try {
      JSON.parse(state);
    } catch (error) {
      throw new ServerError("refused", `The state is not valid JSON: ${error.message}`, "input");
    }
    return { body, state: state.trim() };
  }

  run() {
    return this.work.run(async (signal) => {
      const { body, state } = this.#request();
      const startTime = performance.now();
      const text = asJson({ ...body, return_token_ids: true }, state);
      const { answers, usage } = await this.page.server.decide(text, signal);
      const seconds = (performance.now() - startTime) / 1000;
      await this.page.server.loadBytes(answers.flatMap(({ evidence }) => evidence.label_token_ids.flat()), signal);
      this.#showAnswers(body.questions, answers);
      const { input_tokens: tokens, input_tokens_details: details } = usage;
      const cached = details.cached_tokens ? `, ${count(details.cached_tokens)} cached` : "";
      const noun = answers.length === 1 ? "answer" : "answers";
      this.#part(".status").textContent =
        `${count(answers.length)} ${noun}, ${count(tokens)} prompt tokens${cached}, ${seconds.toFixed(2)} s`;
    });
  }

  #showAnswers(questions, answers) {
    for (const prompts of this.prompts) prompts.stop();
    this.prompts = answers.map(({ evidence }) => {
      const titles = promptTitles(evidence);
      return new Prompts(this.page, evidence.prompt_token_ids.map((ids, i) => ({ title: titles[i], ids })));
    });
    const { server } = this.page;
    const views = answers.map((answer, i) => answerView(questions[i], answer, i, server, this.prompts[i].root));
    this.#part(".answers").replaceChildren(...views);
  }

  /** Shows the request as code, and copies it if the browser permits. */
  async #copy(write, noun) {
    this.showError(null);
    try {
      const { id } = await this.page.card();
      const { body, state } = this.#request();
      const text = write({ model: id, ...body }, state, this.page.server.key());
      Object.assign(this.#part(".code"), { value: text, hidden: false, ariaLabel: noun });
      const copied = await navigator.clipboard.writeText(text).then(() => true, () => false);
      this.#part(".copied").textContent = copied ? `The ${noun} is in the clipboard.` : `Copy the ${noun} from here:`;
    } catch (error) {
      this.showError(error);
      this.page.onError(error);
    }
  }
}
