// Numbers and tokens in words.

const fixed = (digits) => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const two = fixed(2);
const three = fixed(3);
const four = fixed(4);
const six = fixed(6);
const integer = new Intl.NumberFormat("en");
const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const ORIGINS = { prompt: "prompt", branch: "chosen by you", generated: "generated" };

export const count = (value) => integer.format(value);

/** A number in the table of totals; a dash for null. */
export function number(value) {
  if (value === null) return "–";
  return (Math.abs(value) >= 1000 ? count(Math.round(value)) : three.format(value)).replace("-", "−");
}

export const logprob = (value) => (value <= -9999 ? "−∞" : four.format(value).replace("-", "−"));

/** A probability in percent, with enough digits to differ from 0 and 100. */
export function percent(probability) {
  const value = 100 * probability;
  if (value > 99.99 && value < 100) return `${six.format(value)} %`;
  if (value >= 0.01 || value === 0) return `${two.format(value)} %`;
  return `${value < 1e-4 ? value.toExponential(1) : significant.format(value)} %`;
}

/** The description of a token for screen readers. */
export function describe(token) {
  const kind = `${ORIGINS[token.origin]}${token.special ? ", special token" : ""}`;
  if (token.logprob === undefined) return `${kind}, log-prob pending`;
  if (token.logprob === null) return `${kind}, no log-prob (first token)`;
  const mass = token.allowedMass === undefined ? "" : `, allowed mass ${percent(token.allowedMass)}`;
  const numbers = `log-prob ${logprob(token.logprob)}, ${percent(Math.exp(token.logprob))}, rank ${count(token.rank)}`;
  return `${kind}, ${numbers}${mass}${token.forced ? ", forced by the grammar" : ""}`;
}
