// Drawing of tokens from their bytes. A token may contain parts of characters.

import { make } from "./dom.js";

/** Bytes of the UTF-8 character that begins with this byte; 0 if none does. */
function lengthFrom(byte) {
  if (byte < 0x80) return 1;
  if (byte >= 0xc2 && byte < 0xe0) return 2;
  if (byte >= 0xe0 && byte < 0xf0) return 3;
  if (byte >= 0xf0 && byte < 0xf5) return 4;
  return 0;
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });

/** The text of bytes, with U+FFFD for invalid ones. */
export const decoded = (bytes) => lenient.decode(bytes);

/** The complete character that begins at `start`; null if there is none. */
function characterAt(bytes, start) {
  const length = lengthFrom(bytes[start]);
  if (length === 0 || start + length > bytes.length) return null;
  try {
    return decoder.decode(bytes.subarray(start, start + length));
  } catch {
    return null;
  }
}

/** Complete characters, {text}, and bytes that are only part of one, {byte}, in order. */
export function split(bytes) {
  const runs = [];
  let text = "";
  for (let i = 0; i < bytes.length; ) {
    const character = characterAt(bytes, i);
    if (character !== null) {
      text += character;
      i += lengthFrom(bytes[i]);
      continue;
    }
    if (text) runs.push({ text });
    text = "";
    runs.push({ byte: bytes[i++] });
  }
  if (text) runs.push({ text });
  return runs;
}

export const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\p{Co}\p{Cn}]/u;
const MARK = /^\p{M}/u;

/** A token in one line of plain text, for screen readers: escapes instead of glyphs. */
export function plain(bytes) {
  return split(bytes)
    .map((run) => ("byte" in run ? `\\x${hex(run.byte).toLowerCase()}` : escaped(run.text)))
    .join("");
}

/** A text with names in place of invisible characters. */
export function escaped(text) {
  const names = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  return Array.from(text, (c) => names[c] ?? (c !== " " && INVISIBLE.test(c) ? `<${codePoint(c)}>` : c)).join("");
}

/** Draws a token into an element, whose text remains the token's own: CSS adds the signs. */
export function draw(element, bytes) {
  const parts = [];
  for (const run of split(bytes)) {
    if ("byte" in run) parts.push(sign("byte", "", hex(run.byte)));
    else parts.push(...glyphs(run.text, parts.length === 0));
  }
  if (bytes.length === 0) parts.push(sign("code", "", "no bytes"));
  element.replaceChildren(...parts);
}

function glyphs(text, first) {
  const parts = [];
  let letters = "";
  const flush = () => {
    if (letters) parts.push(document.createTextNode(letters));
    letters = "";
  };
  if (first && MARK.test(text)) parts.push(sign("code", "", "◌"));
  for (const character of text) {
    const kind = { " ": "space", "\n": "newline", "\t": "tab" }[character];
    if (kind === undefined && !INVISIBLE.test(character)) {
      letters += character;
      continue;
    }
    flush();
    parts.push(kind ? sign(kind, character) : sign("code", character, codePoint(character)));
  }
  flush();
  return parts;
}

function sign(kind, text, drawn) {
  const element = make("i", { className: kind }, text);
  if (drawn) element.dataset.drawn = drawn;
  return element;
}

/** The character of which token `index` contains a part, and whether this token completes it: {character, last}, or null. */
export function partOf(tokens, index) {
  const { bytes: own, special } = tokens[index];
  if (special || !split(own).some((run) => "byte" in run)) return null;
  const start = Math.max(0, index - 3); // a character has at most 4 bytes
  const near = tokens.slice(start, index + 5);
  const bytes = Uint8Array.from(near.flatMap((token) => [...token.bytes]));
  const owners = near.flatMap((token, i) => Array(token.bytes.length).fill(start + i));
  for (let i = owners.lastIndexOf(index); i >= 0; i--) {
    const character = characterAt(bytes, i);
    const last = owners[i + lengthFrom(bytes[i]) - 1];
    if (character !== null && owners[i] < last && index <= last) return { character, last: index === last };
  }
  return null;
}
