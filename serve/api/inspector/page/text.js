// From a token's bytes to what is drawn for it. A token need not hold whole characters.

/** How many bytes a UTF-8 character has that begins with this byte; 0 for a byte that begins none. */
function lengthFrom(byte) {
  if (byte < 0x80) return 1;
  if (byte >= 0xc2 && byte < 0xe0) return 2;
  if (byte >= 0xe0 && byte < 0xf0) return 3;
  if (byte >= 0xf0 && byte < 0xf5) return 4;
  return 0;
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });

/** The text of bytes, with U+FFFD for what is none. */
export const decoded = (bytes) => lenient.decode(bytes);

/** The character that begins at `start`, or null where these bytes hold none that is whole. */
function characterAt(bytes, start) {
  const length = lengthFrom(bytes[start]);
  if (length === 0 || start + length > bytes.length) return null;
  try {
    return decoder.decode(bytes.subarray(start, start + length));
  } catch {
    return null;
  }
}

/** Runs of whole characters, {text}, and bytes that are only a part of one, {byte}, in order. */
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

/** Two hexadecimal digits. */
export const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

/** U+200B and the like. */
const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\p{Co}\p{Cn}]/u;
const MARK = /^\p{M}/u;

/** A token in one line of plain text, such as for a screen reader or a table: escapes instead of glyphs. */
export function plain(bytes) {
  return split(bytes)
    .map((run) => ("byte" in run ? `\\x${hex(run.byte).toLowerCase()}` : escaped(run.text)))
    .join("");
}

/** A text whose characters that cannot be seen are named. */
export function escaped(text) {
  const names = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  return Array.from(text, (c) => names[c] ?? (c !== " " && INVISIBLE.test(c) ? `<${codePoint(c)}>` : c)).join("");
}

/** Draws a token into an element. The element's text stays the token's own: what is drawn beside it comes from CSS. */
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
  const element = document.createElement("i");
  element.className = kind;
  element.textContent = text;
  if (drawn) element.dataset.drawn = drawn;
  return element;
}

/**
 * The character that token `index` is a part of, if its bytes hold only a part: {character, last}, where `last` says
 * that this token completes it. Null for all others.
 */
export function partOf(tokens, index) {
  const own = tokens[index].bytes;
  if (tokens[index].special || !split(own).some((run) => "byte" in run)) return null;
  for (let start = index; start > index - 4 && start >= 0; start--) {
    const joined = [];
    const owner = [];
    for (let i = start; i < tokens.length && i < start + 5; i++) {
      for (const byte of tokens[i].bytes) {
        joined.push(byte);
        owner.push(i);
      }
    }
    const found = spanning(Uint8Array.from(joined), owner, index);
    if (found) return found;
  }
  return null;
}

function spanning(bytes, owner, index) {
  for (let i = 0; i < bytes.length; ) {
    const character = characterAt(bytes, i);
    const length = character === null ? 1 : lengthFrom(bytes[i]);
    const owners = owner.slice(i, i + length);
    if (character !== null && owners.includes(index) && owners[0] !== owners.at(-1)) {
      return { character, last: owners.at(-1) === index };
    }
    i += length;
  }
  return null;
}
