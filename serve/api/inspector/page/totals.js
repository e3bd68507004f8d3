// Statistics of tokens, as pure functions. Log-probs are natural logarithms.

const withLogprob = (tokens) => tokens.filter((token) => typeof token.logprob === "number");
const indexed = (tokens) => withLogprob(tokens.map(({ logprob }, index) => ({ index, logprob })));
const sumOf = (tokens) => tokens.reduce((sum, token) => sum + token.logprob, 0);

/**
 * Totals of the scored tokens. `bitsPerByte` leaves out special tokens, which are not part of the text; `first` is the
 * share of tokens with rank 1.
 */
export function totals(tokens) {
  const known = withLogprob(tokens);
  const sum = sumOf(known);
  const text = known.filter((token) => !token.special);
  const bytes = text.reduce((total, token) => total + token.bytes.length, 0);
  const mean = known.length ? sum / known.length : null;
  return {
    tokens: tokens.length,
    scored: known.length,
    sum: known.length ? sum : null,
    mean,
    perplexity: mean === null ? null : Math.exp(-mean),
    bitsPerByte: bytes ? -sumOf(text) / Math.LN2 / bytes : null,
    first: known.length ? known.filter((token) => token.rank === 1).length / known.length : null,
  };
}

/**
 * Whether each token of a chat belongs to its template: it is special, or part of the prompt without a byte of a message.
 * Messages are searched in order; one that the template changes counts as template.
 */
export function templateTokens(tokens, messages) {
  const ends = [];
  tokens.forEach(({ bytes }) => ends.push((ends.at(-1) ?? 0) + bytes.length));
  const text = tokens.map(({ bytes }) => String.fromCharCode(...bytes)).join(""); // a character per byte
  const ranges = [];
  for (const { content } of messages) {
    const wanted = Array.from(new TextEncoder().encode(content.trim()), (byte) => String.fromCharCode(byte)).join("");
    const start = wanted ? text.indexOf(wanted, ranges.at(-1)?.end ?? 0) : -1;
    if (start >= 0) ranges.push({ start, end: start + wanted.length });
  }
  return tokens.map(({ origin, special, bytes }, i) => {
    const overlaps = ranges.some(({ start, end }) => ends[i] > start && ends[i] - bytes.length < end);
    return special || (origin === "prompt" && !overlaps);
  });
}

/** Indexes of the `count` tokens with the lowest log-probs, lowest first. */
export function mostSurprising(tokens, count) {
  return indexed(tokens)
    .sort((a, b) => a.logprob - b.logprob || a.index - b.index)
    .slice(0, count)
    .map(({ index }) => index);
}

export const RANKS = [
  { name: "1", from: 1, to: 1 },
  { name: "2–3", from: 2, to: 3 },
  { name: "4–10", from: 4, to: 10 },
  { name: "11–100", from: 11, to: 100 },
  { name: "101–1,000", from: 101, to: 1000 },
  { name: "above 1,000", from: 1001, to: Infinity },
];

/** Number of tokens in each class of RANKS. */
export function rankHistogram(tokens) {
  const ranks = withLogprob(tokens).map((token) => token.rank);
  return RANKS.map(({ from, to }) => ranks.filter((rank) => rank >= from && rank <= to).length);
}

/** Upper bounds of the colors, in nats of surprisal (-log-prob). */
export const STEPS = [0.05, 0.3, 0.7, 1.4, 2.3, 3.5, 5, 7, 10];

/** The color of a token: 0 (certain) to STEPS.length. */
export function step(logprob) {
  const index = STEPS.findIndex((bound) => -logprob < bound);
  return index < 0 ? STEPS.length : index;
}

/** At most `width` points {index, low, mean} along the text: the lowest and the mean log-prob of each stretch. */
export function curve(tokens, width) {
  const known = indexed(tokens);
  const size = Math.max(1, Math.ceil(known.length / width));
  const points = [];
  for (let i = 0; i < known.length; i += size) {
    const stretch = known.slice(i, i + size);
    const lowest = stretch.reduce((a, b) => (b.logprob < a.logprob ? b : a));
    points.push({ index: lowest.index, low: lowest.logprob, mean: sumOf(stretch) / stretch.length });
  }
  return points;
}
