// The state of the page as the fragment of a URL, which browsers do not send to servers.

const PREFIX = "#inspect=";

export const isLink = (hash) => hash.startsWith(PREFIX);

/** The page's URL with `state`, any JSON value, in its fragment. */
export async function linkTo(state) {
  const zipped = await through(new Blob([JSON.stringify(state)]), new CompressionStream("deflate-raw"));
  const text = btoa(Array.from(zipped, (byte) => String.fromCharCode(byte)).join(""));
  const link = new URL(location.href);
  link.hash = PREFIX + text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return link.href;
}

/** The state in a fragment; null if there is none. Throws if it is damaged. */
export async function stateOf(hash) {
  if (!isLink(hash)) return null;
  const text = atob(hash.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(await through(new Blob([bytes]), new DecompressionStream("deflate-raw"))));
}

async function through(blob, transform) {
  return new Uint8Array(await new Response(blob.stream().pipeThrough(transform)).arrayBuffer());
}
