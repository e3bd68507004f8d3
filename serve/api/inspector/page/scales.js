// Scales of the colors: the number of a token that each shows, and its ten steps, from pale to dark.

import { STEPS, step } from "./totals.js";

/** Entropy in nats of a token's alternatives, all others counted as one: at most that of the whole distribution. */
export function entropy(token) {
  const probabilities = alternatives(token).map(({ logprob }) => Math.exp(logprob));
  const rest = 1 - probabilities.reduce((sum, p) => sum + p, 0);
  return [...probabilities, rest].reduce((sum, p) => (p > 0 ? sum - p * Math.log(p) : sum), 0);
}

/** Log-prob of the best alternative minus that of the second; null if only one was returned. */
export function margin(token) {
  const [first, second] = alternatives(token);
  return second ? first.logprob - second.logprob : null;
}

/** The alternatives and the token itself, most likely first. */
function alternatives(token) {
  const isListed = token.top.some((other) => other.id === token.id);
  return isListed ? token.top : [...token.top, token].sort((a, b) => b.logprob - a.logprob);
}

const index = (bounds, value) => bounds.filter((bound) => value >= bound).length;

const RANKS = [2, 3, 5, 10, 30, 100, 300, 1000, 10_000];
const ENTROPIES = [0.1, 0.3, 0.6, 1, 1.5, 2, 2.5, 3, 4];
const MARGINS = [0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6]; // a small one is dark
const DIFFERENCES = [-3, -1.5, -0.5, -0.1, 0.1, 0.5, 1.5, 3];

/** Classes of a token's cell, one for each scale: the page's style sheet has the colors of the scale that is chosen. */
export function steps(token) {
  const classes = [`s${step(token.logprob)}`, `r${index(RANKS, token.rank)}`];
  if (token.top.length > 0) classes.push(`e${index(ENTROPIES, entropy(token))}`);
  const distance = margin(token);
  if (distance !== null) classes.push(`g${STEPS.length - index(MARGINS, distance)}`);
  if (token.allowedMass !== undefined) classes.push(`m${step(Math.log(token.allowedMass))}`);
  return classes;
}

export const differenceStep = (difference) => `d${index(DIFFERENCES, difference)}`;

/**
 * Log-prob of each token minus that of the token with the same bytes at the same place of another run, counted in bytes from
 * the start, or else from the end; undefined where there is none.
 */
export function differences(tokens, others) {
  const fromStart = byPlace(others, places(others));
  const end = (list, starts) => starts.map((start) => starts.total - start);
  const [own, other] = [places(tokens), places(others)];
  const fromEnd = byPlace(others, end(others, other));
  const ends = end(tokens, own);
  return tokens.map((token, i) => {
    const same = [fromStart.get(own[i]), fromEnd.get(ends[i])].find((found) => found && equal(found.bytes, token.bytes));
    const known = [token, same].every((each) => typeof each?.logprob === "number");
    return known ? token.logprob - same.logprob : undefined;
  });
}

/** Bytes before each token; the array's `total` is that of all. */
function places(tokens) {
  let total = 0;
  const starts = tokens.map(({ bytes }) => {
    total += bytes.length;
    return total - bytes.length;
  });
  return Object.assign(starts, { total });
}

const byPlace = (tokens, starts) => new Map(tokens.map((token, i) => [starts[i], token]));

const equal = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);
