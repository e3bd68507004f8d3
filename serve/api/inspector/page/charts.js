// The log-prob curve along a text and the histogram of ranks, as SVG.

import { count, logprob } from "./format.js";
import { RANKS, curve, rankHistogram } from "./totals.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 80;
const DEEPEST = -12; // nats; what is below is drawn there

/** Draws the curve; a click calls `onPick(index)` with the least likely token of the stretch that was clicked. */
export function drawCurve(svg, tokens, onPick) {
  const points = curve(tokens, WIDTH / 2);
  const x = (i) => (points.length > 1 ? (i * WIDTH) / (points.length - 1) : WIDTH / 2);
  const y = (value) => (HEIGHT * Math.max(value, DEEPEST)) / DEEPEST;
  const line = (name) => points.map((point, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(point[name]).toFixed(1)}`).join("");
  const title = shape("title", {}, `Log-prob per token, from 0 (top) to ${DEEPEST} or less (bottom)`);
  const grid = [-2, -4, -6, -8, -10].map((value) => shape("path", { class: "grid", d: `M0 ${y(value)}H${WIDTH}` }));
  const lines = ["low", "mean"].map((name) => shape("path", { class: name, d: line(name) }));
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(title, ...grid, ...lines);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    return points[Math.round(((event.clientX - box.left) / box.width) * (points.length - 1))];
  };
  svg.onclick = (event) => points.length && onPick(nearest(event).index);
  svg.onpointermove = (event) => {
    if (points.length) title.textContent = `token ${count(nearest(event).index)}: ${logprob(nearest(event).low)}`;
  };
}

/** Draws how many tokens have which rank. */
export function drawHistogram(list, tokens) {
  const counts = rankHistogram(tokens);
  const most = Math.max(1, ...counts);
  list.replaceChildren(
    ...RANKS.map(({ name }, i) => {
      const item = document.createElement("li");
      const [label, bar, size] = ["label", "bar", "size"].map((className) =>
        Object.assign(document.createElement("span"), { className }),
      );
      label.textContent = `rank ${name}`;
      size.textContent = count(counts[i]);
      bar.style.setProperty("--share", counts[i] / most);
      item.append(label, bar, size);
      return item;
    }),
  );
}

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
