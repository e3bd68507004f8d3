// Helpers that create elements.

/** A new element with properties and children, which are elements or texts. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A row of a table. Its first cell is a heading unless it is empty; the others have the given tag. */
export function row(tag, [name, ...values]) {
  const head = name ? make("th", { scope: "row" }, name) : make("td");
  return make("tr", {}, head, ...values.map((value) => make(tag, {}, value)));
}

/** A bar of a chart, filled to `share`, 0 to 1. */
export function bar(share) {
  const element = make("span", { className: "bar" });
  element.style.setProperty("--share", share);
  return element;
}

/** A copy of the element in a template. */
export const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);
