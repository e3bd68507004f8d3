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
export const decode = (bytes) => lenient.decode(bytes);

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

/** The complete characters, {text}, and the bytes that are only part of one, {byte}, in order. */
export function split(bytes) {
  const parts = [];
  for (let i = 0; i < bytes.length; ) {
    const text = characterAt(bytes, i);
    parts.push(text === null ? { byte: bytes[i] } : { text });
    i += text === null ? 1 : lengthFrom(bytes[i]);
  }
  return parts;
}

export const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\p{Co}\p{Cn}]/u;
const MARK = /^\p{M}/u;

/** A token in one line of plain text, for screen readers: escapes instead of glyphs. */
export function plain(bytes) {
  return split(bytes)
    .map((run) => ("byte" in run ? `\\x${hex(run.byte).toLowerCase()}` : escapeInvisible(run.text)))
    .join("");
}

/** A text with names in place of invisible characters. */
export function escapeInvisible(text) {
  const names = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  return Array.from(text, (c) => names[c] ?? (c !== " " && INVISIBLE.test(c) ? `<${codePoint(c)}>` : c)).join("");
}

/** Draws a token into an element, whose text remains the token's own: CSS adds the signs. */
export function draw(element, bytes) {
  const parts = split(bytes);
  const signs = parts.map(({ text, byte }) => (text === undefined ? sign("byte", "", hex(byte)) : glyph(text)));
  if (parts.length === 0) signs.push(sign("code", "", "no bytes"));
  else if (MARK.test(parts[0].text ?? "")) signs.unshift(sign("code", "", "◌"));
  element.replaceChildren(...signs);
  element.normalize(); // joins the letters of a text
}

function glyph(character) {
  const kind = { " ": "space", "\n": "newline", "\t": "tab" }[character];
  if (kind) return sign(kind, character);
  return INVISIBLE.test(character) ? sign("code", character, codePoint(character)) : character;
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
