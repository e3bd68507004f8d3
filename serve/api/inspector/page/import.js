// Runs from files that this page exported.

import { Run } from "./run.js";

/** The run in an exported file, parsed. Throws an error if it is not one. */
export function importedRun(exported, server) {
  const { format, version, title, request, parameters, tokens } = exported ?? {};
  if (format !== "logprobd inspection" || version !== 1 || !Array.isArray(tokens)) throw new Error("it was not exported by this page");
  const run = new Run(server, String(title), request);
  run.tokens = tokens.map(importedToken);
  run.fills = parameters;
  run.finish = exported.finish_reason;
  run.usage = exported.usage;
  if (exported.model) run.source = { model: exported.model, fingerprint: exported.system_fingerprint };
  const grammar = parameters.at(-1)?.structured_outputs;
  const start = exported.grammar_start ?? null;
  if (grammar && start !== null) run.form = { grammar: JSON.stringify(grammar), start };
  return run;
}

function importedToken({ position, origin, allowed_mass: mass, forced, top, ...own }) {
  const token = { ...importedEntry(own), origin, top: top.map(importedEntry) };
  if (token.logprob === null && position > 0) token.logprob = undefined; // its request was stopped
  return mass === null ? token : { ...token, allowedMass: mass, forced };
}

const importedEntry = ({ token_id: id, bytes, special, logprob, rank }) => ({ id, bytes: Uint8Array.from(bytes), special, logprob, rank });
