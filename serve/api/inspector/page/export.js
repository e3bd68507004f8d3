// Export of a run as JSON or CSV.

import { decoded, hex } from "./text.js";
import { totals } from "./totals.js";

const probability = (logprob) => (typeof logprob === "number" ? Math.exp(logprob) : null);

export function asJson(run) {
  const tokens = run.tokens.map((token, position) => ({
    position,
    origin: token.origin,
    ...entry(token),
    top: token.top.map(entry),
  }));
  const { title, source, prompt, fills, finish, usage } = run;
  const about = { format: "logprobd inspection", version: 1, model: source?.model, system_fingerprint: source?.fingerprint };
  const asked = { title, request: prompt, parameters: fills, finish_reason: finish, usage };
  return JSON.stringify({ ...about, ...asked, totals: totals(run.tokens), tokens }, null, 1);
}

function entry(token) {
  return {
    token_id: token.id,
    text: decoded(token.bytes), // lossy for a part of a character
    bytes: [...token.bytes],
    special: token.special,
    logprob: token.logprob ?? null,
    probability: probability(token.logprob),
    rank: token.rank,
  };
}

/**
 * One line per token (RFC 4180). Texts are JSON strings, so that they contain no line breaks and no spreadsheet reads
 * one as a formula.
 */
export function asCsv(run) {
  const width = Math.max(0, ...run.tokens.map((token) => token.top.length));
  const own = ["position", "origin", "token_id", "text", "bytes", "special", "logprob", "probability", "rank"];
  const others = Array.from({ length: width }, (_, i) =>
    ["token_id", "text", "logprob"].map((name) => `top_${i + 1}_${name}`),
  );
  const rows = run.tokens.map((token, position) => [
    position,
    token.origin,
    token.id,
    JSON.stringify(decoded(token.bytes)),
    Array.from(token.bytes, hex).join(""),
    token.special,
    token.logprob ?? "",
    probability(token.logprob) ?? "",
    token.rank ?? "",
    ...Array.from({ length: width }, (_, i) => alternative(token.top[i])).flat(),
  ]);
  return [[...own, ...others.flat()], ...rows].map((row) => row.map(quoted).join(",") + "\r\n").join("");
}

const alternative = (other) => (other ? [other.id, JSON.stringify(decoded(other.bytes)), other.logprob] : ["", "", ""]);

const quoted = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));

/** Downloads a text as a file. */
export function save(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
