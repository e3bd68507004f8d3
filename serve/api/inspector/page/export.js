// Export of a run as JSON or CSV.

import { decode, hex } from "./text.js";
import { totals } from "./totals.js";

export function asJson(run) {
  const { title, source, prompt, fills, finish, usage } = run;
  const about = { format: "logprobd inspection", version: 1, model: source?.model, system_fingerprint: source?.fingerprint };
  const request = { title, request: prompt, parameters: fills, finish_reason: finish, usage, grammar_start: run.form?.start ?? null };
  return JSON.stringify({ ...about, ...request, totals: totals(run.tokens), tokens: exportedTokens(run) }, null, 1);
}

const exportedTokens = (run) =>
  run.tokens.map((token, position) => {
    const { origin, allowedMass: mass = null, forced, top } = token;
    const grammar = { allowed_mass: mass, forced: mass === null ? null : forced };
    return { position, origin, ...entry(token), ...grammar, top: top.map(entry) };
  });

const entry = ({ id, bytes, special, logprob = null, rank }) => ({
  token_id: id,
  text: decode(bytes), // lossy for a part of a character
  bytes: [...bytes],
  special,
  logprob,
  probability: logprob === null ? null : Math.exp(logprob),
  rank,
});

const COLUMNS = ["position", "origin", "token_id", "text", "bytes", "special", "logprob", "probability", "rank", "allowed_mass", "forced"];
const TOP_COLUMNS = ["token_id", "text", "logprob"];

/**
 * One line per token (RFC 4180). Texts are JSON strings, so that they contain no line breaks and no spreadsheet reads
 * one as a formula.
 */
export function asCsv(run) {
  const tokens = exportedTokens(run);
  const width = Math.max(0, ...tokens.map((token) => token.top.length));
  const indexes = Array.from({ length: width }, (_, i) => i);
  const names = [...COLUMNS, ...indexes.flatMap((i) => TOP_COLUMNS.map((name) => `top_${i + 1}_${name}`))];
  const rows = tokens.map((token) => [
    ...COLUMNS.map((name) => field(name, token[name])),
    ...indexes.flatMap((i) => TOP_COLUMNS.map((name) => field(name, token.top[i]?.[name]))),
  ]);
  return [names, ...rows].map((row) => row.join(",") + "\r\n").join("");
}

function field(name, value) {
  if (name === "bytes") return value.map(hex).join("");
  const text = name === "text" && value !== undefined ? JSON.stringify(value) : String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Downloads a text as a file. */
export function save(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
