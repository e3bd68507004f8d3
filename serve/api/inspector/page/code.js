// A decision as text: the body of its request, a curl command and a Python program.

/** Stands for the state in a body, so that JSON is sent as it was typed: numbers and the order of keys stay. */
export const STATE = "\uf8ff";

/** The JSON of a body, with `state`, unless it is null, in the place of STATE. */
export const asJson = (body, state, indent) =>
  JSON.stringify(body, null, indent).replace(JSON.stringify(STATE), (mark) => state ?? mark);

export const asCurl = (body, state, key) => curl("v1/decisions", asJson(body, state, 2), key);

/** A command that posts JSON to a path of the server. */
export function curl(path, json, key) {
  const url = new URL(path, document.baseURI);
  const headers = ["Content-Type: application/json", ...(key ? ["Authorization: Bearer $LOGPROBD_API_KEY"] : [])];
  const options = headers.map((header) => `-H "${header}" `).join("");
  return `curl ${url} ${options}--data-binary @- <<'END'\n${json}\nEND\n`;
}

/** The line of a program that makes a client of the server. */
export function client(key) {
  const secret = key ? 'os.environ["LOGPROBD_API_KEY"]' : '"none"';
  return `client = OpenAI(base_url="${new URL("v1", document.baseURI)}", api_key=${secret})`;
}

/** A program that uses the package `openai`. Strings, numbers, lists and objects of JSON are also those of Python. */
export function asPython({ model, input, questions, ...others }, state, key) {
  const parsed = state === null ? null : `json.loads(${JSON.stringify(state)})`;
  const literal = (value) => asJson(value, parsed, 4).replaceAll("\n", "\n    ");
  const fields = { model, input, questions, ...(Object.keys(others).length && { extra_body: others }) };
  const modules = [...(parsed === null ? [] : ["json"]), ...(key ? ["os"] : [])];
  return [
    ...modules.map((name) => `import ${name}`),
    ...(modules.length ? [""] : []),
    "from openai import OpenAI",
    "",
    client(key),
    "decision = client.decisions.create(",
    ...Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
    "for answer in decision.answers:",
    "    print(answer.to_json())",
    "",
  ].join("\n");
}
