// Numbers as people read them.

const fixed = (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const two = fixed(2);
const three = fixed(3);
const four = fixed(4);
const whole = new Intl.NumberFormat("en");
const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** An integer with separators. */
export const count = (value) => whole.format(value);

/** A number of the table of totals; a dash where there is none. */
export function number(value) {
  if (value === null) return "–";
  return (Math.abs(value) >= 1000 ? count(Math.round(value)) : three.format(value)).replace("-", "−");
}

/** A log-prob in nats. */
export const logprob = (value) => (value <= -9999 ? "−∞" : four.format(value).replace("-", "−"));

/** A probability in percent, with digits enough to tell it from 0 and from 100. */
export function percent(probability) {
  const value = 100 * probability;
  if (value > 99.99 && value < 100) return `${fixed(6).format(value)} %`;
  if (value >= 0.01 || value === 0) return `${two.format(value)} %`;
  return `${value < 1e-4 ? value.toExponential(1) : significant.format(value)} %`;
}

/** What a screen reader says of a token. */
export function describe(token) {
  const kind = { prompt: "prompt", branch: "chosen by you", generated: "generated" }[token.origin];
  const special = token.special ? ", special token" : "";
  if (token.logprob === undefined) return `${kind}${special}, log-prob pending`;
  if (token.logprob === null) return `${kind}${special}, no log-prob (first token)`;
  const numbers = `log-prob ${logprob(token.logprob)}, ${percent(Math.exp(token.logprob))}, rank ${count(token.rank)}`;
  return `${kind}${special}, ${numbers}`;
}
