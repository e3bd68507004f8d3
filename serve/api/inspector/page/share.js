// What was typed, as the part of an address after the #, which browsers do not send to any server.

const PREFIX = "#inspect=";

/** Whether this part of an address holds what was typed. */
export const isLink = (hash) => hash.startsWith(PREFIX);

/** An address of this page that holds `state`, any JSON. */
export async function linkTo(state) {
  const zipped = await through(new Blob([JSON.stringify(state)]), new CompressionStream("deflate-raw"));
  const text = btoa(Array.from(zipped, (byte) => String.fromCharCode(byte)).join(""));
  const link = new URL(location.href);
  link.hash = PREFIX + text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return link.href;
}

/** The state that this address holds, null if none. Throws where it is damaged. */
export async function stateOf(hash) {
  if (!isLink(hash)) return null;
  const text = atob(hash.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(await through(new Blob([bytes]), new DecompressionStream("deflate-raw"))));
}

async function through(blob, transform) {
  return new Uint8Array(await new Response(blob.stream().pipeThrough(transform)).arrayBuffer());
}
