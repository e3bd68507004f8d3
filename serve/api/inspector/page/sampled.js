// The distribution that is drawn from, computed from the raw alternatives of a token, as sliders move.

import { make } from "./dom.js";

const SLIDERS = [
  { name: "temperature", min: 0.05, max: 2, step: 0.05, value: 1 },
  { name: "top p", min: 0.01, max: 1, step: 0.01, value: 1 },
  { name: "top k", min: 0, max: 100, step: 1, value: 0 },
  { name: "min p", min: 0, max: 1, step: 0.01, value: 0 },
];

/**
 * Probabilities after temperature, min_p, top_k and top_p, in the order of the server; 0 for what the filters exclude. Only
 * these alternatives count: the rest of the vocabulary is left out.
 */
export function sampled(logprobs, [temperature, topP, topK, minP]) {
  const best = Math.max(...logprobs);
  const weights = logprobs.map((value) => Math.exp((value - best) / temperature));
  const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b);
  const allowed = order.slice(0, topK > 0 ? topK : order.length).filter((i) => weights[i] >= minP);
  const target = topP * sum(allowed.map((i) => weights[i]));
  const kept = new Set();
  let mass = 0;
  for (const i of allowed) {
    if (mass >= target && kept.size > 0) break;
    kept.add(i);
    mass += weights[i];
  }
  return weights.map((weight, i) => (kept.has(i) ? weight / mass : 0));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Sliders of the four parameters. They keep their values from token to token. */
export class Sampling {
  constructor(onInput) {
    this.inputs = SLIDERS.map(({ name, ...range }) => Object.assign(make("input", { type: "range" }), range, { ariaLabel: `${name} of the sampled distribution` }));
    const outputs = SLIDERS.map(({ value }) => make("output", {}, String(value)));
    const labels = SLIDERS.map(({ name }, i) => make("label", {}, name, this.inputs[i], outputs[i]));
    const hint = make("p", { className: "hint" }, "Among the alternatives shown, from raw log-probs; without penalties.");
    this.root = make("details", { className: "sampling" }, make("summary", {}, "Sampled distribution"), ...labels, hint);
    this.root.addEventListener("input", () => {
      outputs.forEach((output, i) => (output.textContent = this.inputs[i].value));
      onInput();
    });
    this.root.addEventListener("toggle", onInput);
  }

  /** Probabilities of tokens with these log-probs; null while the sliders are closed. */
  of(logprobs) {
    return this.root.open ? sampled(logprobs, this.inputs.map((input) => Number(input.value))) : null;
  }
}
