// Two small charts in SVG: lines over time, and a distribution in buckets.
//
// Drawn in a fixed box that stretches with the page; words stay HTML, so they never stretch.

import { h, s } from "./dom.js";
import { seconds } from "./format.js";
import { quantile, total } from "./history.js";

const WIDTH = 600;
const HEIGHT = 150;
const QUANTILES = [["p50", 0.5], ["p90", 0.9], ["p99", 0.99]];

function card(title, plot, axis) {
  const readout = h("p", { class: "readout" });
  const element = h("section", { class: "card" }, h("header", {}, h("h2", {}, title), readout), plot, axis);
  return { element, readout };
}

function canvas(title) {
  return s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `${title}, no data yet`,
  });
}

function grid(lines) {
  const paths = Array.from({ length: lines }, (_, i) => `M0 ${(HEIGHT / lines) * i}H${WIDTH}`);
  return s("path", { class: "gridline", d: paths.join("") });
}

/** The smallest round number that is not below `value`. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power);
  return steps.find((step) => step >= value * 0.999);
}

/** Series over the last seconds. `series` is [{name, tone}], the first one is filled. */
export class LineChart {
  constructor(title, series, format) {
    this.title = title;
    this.series = series;
    this.format = format;
    this.svg = canvas(title);
    this.fill = s("path", { class: `area ${series[0].tone}` });
    this.lines = series.map(({ tone }) => s("path", { class: `line ${tone}` }));
    this.cursor = s("path", { class: "cursor" });
    this.svg.append(grid(2), this.fill, ...this.lines, this.cursor);
    this.top = h("span", { class: "top" });
    this.plot = h("div", { class: "plot" }, this.svg, this.top);
    this.since = h("span", {});
    const axis = h("div", { class: "axis" }, this.since, h("span", {}, "now"));
    Object.assign(this, card(title, this.plot, axis));
    this.values = series.map(({ name, tone }) => {
      const value = h("b", {});
      this.readout.append(h("span", { class: `key ${tone}` }, `${name} `, value));
      return value;
    });
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  /** Draws `rows`, one list of a value per second (null: none) per series; `most` fixes the top. */
  update(rows, most = null) {
    this.rows = rows;
    const known = rows.flat().filter((value) => value !== null);
    const top = most ?? ceiling(Math.max(1, ...known));
    this.top.textContent = this.format(top);
    rows.forEach((row, index) => this.lines[index].setAttribute("d", this.path(row, top, false)));
    this.fill.setAttribute("d", this.path(rows[0], top, true));
    this.read();
    const now = this.series.map(({ name }, i) => `${name} ${this.format(rows[i].at(-1))}`);
    const span = seconds(rows[0].length - 1);
    this.since.textContent = `${span} ago`;
    this.svg.setAttribute("aria-label", `${this.title}, last ${span}; now ${now.join(", ")}`);
  }

  path(row, top, isArea) {
    const step = WIDTH / (row.length - 1);
    let path = "";
    let start = null;
    row.forEach((value, index) => {
      const x = (index * step).toFixed(1);
      if (value !== null) {
        const y = (HEIGHT - 1 - Math.min(value / top, 1) * (HEIGHT - 4)).toFixed(1);
        if (start === null) path += isArea ? `M${x} ${HEIGHT}L${x} ${y}` : `M${x} ${y}`;
        else path += `L${x} ${y}`;
        start ??= x;
      }
      const ends = value === null || index === row.length - 1;
      if (ends && start !== null) {
        const last = ((value === null ? index - 1 : index) * step).toFixed(1);
        if (isArea) path += `L${last} ${HEIGHT}Z`;
        start = null;
      }
    });
    return path;
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const part = event === null ? null : (event.clientX - box.left) / box.width;
    this.pointed = part === null ? null : Math.min(Math.max(part, 0), 1);
    const x = part === null ? null : this.pointed * WIDTH;
    this.cursor.setAttribute("d", x === null ? "" : `M${x} 0V${HEIGHT}`);
    if (this.rows) this.read();
  }

  read() {
    this.rows.forEach((row, index) => {
      const at = Math.round((this.pointed ?? 1) * (row.length - 1));
      this.values[index].textContent = this.format(row[at]);
    });
  }
}

/** How observations of a time (s) spread over buckets, with their quantiles. */
export class DistributionChart {
  constructor(title) {
    this.title = title;
    this.svg = canvas(title);
    this.bars = s("g", { class: "bars" });
    this.marks = s("path", { class: "marks" });
    this.names = h("div", { class: "names", "aria-hidden": "true" });
    this.svg.append(grid(2), this.bars, this.marks);
    this.empty = h("p", { class: "empty" }, "No data in this span");
    this.axis = h("div", { class: "axis ticks" });
    Object.assign(this, card(title, h("div", { class: "plot" }, this.svg, this.names, this.empty), this.axis));
  }

  /** Draws one distribution: {bounds, counts} with one count more than bounds. */
  update(distribution) {
    const isEmpty = total(distribution) === 0;
    this.empty.hidden = !isEmpty;
    const { counts } = distribution;
    const first = Math.max(0, counts.findIndex((count) => count > 0) - 1);
    const last = isEmpty ? 0 : Math.min(counts.length, counts.findLastIndex((c) => c > 0) + 2);
    this.drawBars(counts.slice(first, last));
    this.drawTicks(distribution.bounds, first, last);
    this.drawQuantiles(distribution, first, last);
  }

  drawBars(counts) {
    const most = Math.max(1, ...counts);
    const width = WIDTH / Math.max(counts.length, 1);
    const bars = counts.map((count, index) => {
      const height = count === 0 ? 0 : Math.max(2, (count / most) * (HEIGHT - 26));
      return s("rect", {
        x: index * width + width * 0.06,
        y: HEIGHT - height,
        width: width * 0.88,
        height,
      });
    });
    this.bars.replaceChildren(...bars);
  }

  drawTicks(bounds, first, last) {
    const slots = last - first;
    const every = Math.max(1, Math.ceil(slots / 6));
    const ticks = [];
    for (let slot = every; slot < slots; slot += every) {
      const tick = h("span", {}, seconds(bounds[first + slot - 1]));
      tick.style.left = `${(slot / slots) * 100}%`;
      ticks.push(tick);
    }
    this.axis.replaceChildren(...ticks);
  }

  drawQuantiles(distribution, first, last) {
    const found = QUANTILES.map(([name, q]) => ({ name, ...quantile(distribution, q) }));
    const known = found.filter(({ bucket }) => bucket !== undefined);
    const at = ({ bucket, part }) => (bucket - first + part) / (last - first);
    this.marks.setAttribute("d", known.map((one) => `M${at(one) * WIDTH} 0V${HEIGHT}`).join(""));
    this.names.replaceChildren(...known.map((one) => nameAt(one.name, at(one))));
    const words = found.map((one) => [one.name, wordsOf(one.seconds, distribution.bounds)]);
    this.readout.replaceChildren(
      ...words.map(([name, value]) => h("span", { class: "key" }, `${name} `, h("b", {}, value))),
    );
    this.svg.setAttribute("aria-label", `${this.title}: ${words.map((w) => w.join(" ")).join(", ")}`);
  }
}

function nameAt(name, part) {
  const label = h("span", {}, name);
  label.style.left = `${part * 100}%`;
  return label;
}

function wordsOf(value, bounds) {
  return value === Infinity ? `> ${seconds(bounds.at(-1))}` : seconds(value ?? null);
}
