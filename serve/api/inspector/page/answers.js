// The answer to a question: bars of probabilities, and the evidence they were computed from.

import { bar, make, row } from "./dom.js";
import { count, logprob, number, percent } from "./format.js";
import { draw } from "./text.js";

/** An element for one answer. `server` knows the bytes of its tokens; `prompts` is an element with the prompts. */
export function answerView(question, answer, index, server, prompts) {
  const { evidence } = answer;
  const options = optionsOf(answer);
  const name = answer.name === null ? "" : `${answer.name}: `;
  const heading = make("h2", {}, `${index + 1}. ${name}`, make("strong", {}, resultOf(answer, options)));
  const view = make("article", { className: "answer" }, heading, make("p", { className: "kind" }, question.instructions));
  view.append(scrolled(table(options, evidence, server)), facts(answer, options));
  if (evidence.orders?.length > 1) view.append(...ordersOf(options, evidence));
  view.append(prompts);
  return view;
}

/** Titles of the prompts whose ids the evidence has. */
export function promptTitles({ orders, prompt_token_ids: prompts }) {
  if (orders) return prompts.map((_, i) => `order ${i + 1}`);
  return prompts.map((_, i) => (i === 0 ? "prompt" : "empty state"));
}

/** {text, probability} of each option, in the order of the question. */
function optionsOf({ type, probability, probabilities }) {
  if (type === "predicate") return [{ text: "yes", probability }, { text: "no", probability: 1 - probability }];
  return probabilities.map(({ value, label, probability }) => ({
    text: type === "score" ? `${value}: ${label}` : String(value),
    probability,
  }));
}

const highest = (values) => values.indexOf(Math.max(...values));

function resultOf(answer, options) {
  if (answer.type === "score") return `${number(answer.score)} (0 to ${options.length - 1})`;
  const best = options[highest(options.map((option) => option.probability))];
  return `${best.text}, ${percent(best.probability)}`;
}

/** Columns of the table after the probability: heading, and the content for option `i`. Some apply to few answers. */
function columnsOf(evidence, server) {
  const { scoring, logprobs, label_token_ids: ids, normalize, normalized, prior_logprobs: priors, orders, spread } = evidence;
  const isSequence = scoring === "sequences";
  const columns = [
    [isSequence ? "tokens" : "labels", (i) => tokens(ids[i], server, isSequence)],
    ["log-prob", (i) => logprob(logprobs[i])],
  ];
  if (priors) columns.push(["empty state", (i) => logprob(priors[i])]);
  if (normalized && normalize !== "sum") columns.push([NORMALIZED[normalize], (i) => logprob(normalized[i])]);
  if (orders?.length > 1) columns.push(["spread", (i) => percent(spread[i])]);
  return columns;
}

const NORMALIZED = { token: "per token", byte: "per byte", pmi: "difference" };

const range = (orders, i) => [Math.min, Math.max].map((end) => end(...orders.map((order) => order.probabilities[i])));

function table(options, evidence, server) {
  const columns = columnsOf(evidence, server);
  const head = make("tr", {}, ...["option", "", "probability", ...columns.map(([name]) => name)].map(heading));
  const rows = options.map(({ text, probability }, i) => {
    const chart = bar(probability);
    if (evidence.orders?.length > 1) markRange(chart, range(evidence.orders, i));
    return row("td", [text, chart, percent(probability), ...columns.map(([, content]) => content(i))]);
  });
  return make("table", { className: "probabilities" }, make("thead", {}, head), make("tbody", {}, ...rows));
}

const heading = (name) => (name ? make("th", { scope: "col" }, name) : make("td"));

const scrolled = (content) => make("div", { className: "wide", tabIndex: 0, role: "group", ariaLabel: "Numbers" }, content);

function markRange(chart, [low, high]) {
  chart.classList.add("range");
  chart.style.setProperty("--low", low);
  chart.style.setProperty("--high", high);
}

/** The tokens of a sequence, or the labels of an option, which are alternatives of one token. */
function tokens(ids, { bytes, special }, isSequence) {
  const list = make("span", { className: "tokens" });
  ids.forEach((id, i) => {
    const cell = make("span", { className: special.has(id) ? "cell special" : "cell", title: `token ${id}` });
    draw(cell, bytes.get(id));
    list.append(i > 0 && !isSequence ? " or " : "", cell);
  });
  return list;
}

function facts(answer, options) {
  const { evidence } = answer;
  const isSequence = evidence.scoring === "sequences";
  const yes = evidence.orders?.length > 1 ? "yes, in all orders" : "yes";
  const no = evidence.orders?.length > 1 ? "not in all orders" : "no";
  const apart = options.filter((_, i) => evidence.encoded_apart?.[i]).map((option) => option.text);
  const entries = [
    [isSequence ? "sequence mass" : "label mass", percent(evidence.label_mass)],
    [`most likely token ${isSequence ? "begins a sequence" : "is a label"}`, evidence.argmax_is_label ? yes : no],
    ["confidence", answer.confidence === undefined ? null : formula(answer.confidence, evidence.confidence_formula)],
    ["score", answer.score === undefined ? null : formula(answer.score, evidence.score_formula)],
    ["scoring", [evidence.scoring, evidence.normalize].filter(Boolean).join(", ")],
    ["temperature", String(evidence.temperature)],
    ["prompt tokens", `${count(evidence.prompt_tokens)}, ${count(evidence.cached_tokens)} cached`],
    ["end of turn", evidence.counts_end_of_turn === false ? "not scored: the model has none" : null],
    ["encoded apart from the prompt", apart.join(", ") || null],
  ];
  const shown = entries.filter(([, content]) => content !== null);
  return make("dl", { className: "facts" }, ...shown.flatMap(([term, content]) => [make("dt", {}, term), make("dd", {}, content)]));
}

const formula = (value, text) => make("span", {}, `${number(value)} = `, make("code", {}, text));

/** The effect of the order of the options: how often it changes the answer, and the probabilities in each order. */
function ordersOf(options, { orders, spread }) {
  const bests = orders.map((order) => highest(order.probabilities));
  const mean = highest(options.map((option) => option.probability));
  const changed = bests.filter((best) => best !== mean).length;
  const text =
    `Effect of the order: the most likely option differs in ${count(changed)} of ${count(orders.length)} orders; ` +
    `the largest spread is ${percent(Math.max(...spread))}.`;
  const head = make("tr", {}, ...["order", ...options.map((option) => option.text), "label mass", "top is label"].map(heading));
  const rows = orders.map((order, i) => {
    const name = `${i + 1}. ${order.order.map((option) => options[option].text).join(", ")}`;
    const cells = order.probabilities.map((value, j) => (j === bests[i] ? make("strong", {}, percent(value)) : percent(value)));
    return row("td", [name, ...cells, percent(order.label_mass), order.argmax_is_label ? "yes" : "no"]);
  });
  const numbers = scrolled(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  return [make("p", { className: "effect" }, text), make("details", {}, make("summary", {}, "All orders"), numbers)];
}
