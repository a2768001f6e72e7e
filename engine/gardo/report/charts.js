"use strict";
// Reads values off the charts of a page, stretches them and smooths them. A chart is complete
// without this script: an SVG by gardo.report.chart, whose values are the JSON of its data-chart.

const known = (value) => value !== null && value !== undefined;
const said = (value) => String(Number(value.toPrecision(5))).replace("-", "\u2212");
const clamp = (value, [low, high]) => Math.min(Math.max(value, low), high);

function add(parent, name, attributes = {}, text = "") {
  const made = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return parent.appendChild(made);
}

// Multiples of 1, 2 or 5 times a power of ten, as gardo.report.axes has them.
function ticks(low, high, target, least) {
  const raw = (high - low) / target;
  const power = 10 ** Math.floor(Math.log10(raw));
  const by = Math.max(least, [1, 2, 5, 10].find((one) => one * power >= raw * (1 - 1e-9)) * power);
  const decimals = Math.max(0, -Math.floor(Math.log10(by) + 1e-9));
  const found = [];
  for (let k = Math.ceil(low / by - 1e-9); k * by <= high + 1e-9 * by; k++) {
    const value = k * by;
    const plain = Math.abs(value) < 1e5 && decimals < 5;
    const digits = plain ? value.toFixed(decimals) : value.toExponential(1);
    const label = Math.abs(value) < 1e-6 * by ? "0" : digits;
    found.push([value, label.replace("-", "\u2212")]);
  }
  return found;
}

// Centred moving mean of what is known.
function smoothed(values, window) {
  const half = Math.floor(window / 2);
  return values.map((_, at) => {
    const near = values.slice(Math.max(0, at - half), at + half + 1).filter(known);
    return near.length ? near.reduce((sum, one) => sum + one, 0) / near.length : null;
  });
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.svg = figure.querySelector("svg.chart");
    this.all = JSON.parse(this.svg.dataset.chart);
    this.view = { x: this.all.x, y: this.all.y };
    this.means = this.all.curves.map(({ y, smooth, stride }) =>
      smooth > 1 ? smoothed(y, Math.round(smooth / stride)) : null);
    this.groups = [...this.svg.querySelectorAll(".curve")];
    this.steps = [...new Set(this.all.curves.flatMap((one) => one.x))].sort((a, b) => a - b);
    for (const title of this.svg.querySelectorAll(".data title")) title.remove();
    const [left, top, right, bottom] = this.all.plot;
    this.picked = add(this.svg, "rect", { class: "picked", y: top, height: bottom - top });
    this.line = add(this.svg, "line", { class: "cursor", y1: top, y2: bottom });
    this.tip = add(figure, "div", { class: "tip", role: "status" });
    const reset = add(figure, "button", { type: "button", class: "reset" }, "whole run");
    reset.addEventListener("click", () => this.together((one) => one.stretch(null)));
    this.width = right - left;
    this.step = null;
    this.listen();
  }

  together(change) {
    this.group.forEach(change);
  }

  atX(value) {
    const [low, high] = this.view.x;
    return this.all.plot[0] + ((value - low) / (high - low)) * this.width;
  }

  atY(value) {
    const [low, high] = this.view.y;
    const [, top, , bottom] = this.all.plot;
    return bottom - ((value - low) / (high - low)) * (bottom - top);
  }

  // The step under a pointer.
  under(event) {
    const box = this.svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
    const [low, high] = this.view.x;
    const value = low + ((at - this.all.plot[0]) / this.width) * (high - low);
    return clamp(value, this.view.x);
  }

  nearest(value) {
    const near = this.steps.filter((one) => this.view.x[0] <= one && one <= this.view.x[1]);
    const closer = (a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a);
    return near.length ? near.reduce(closer) : null;
  }

  // A line at the step in each chart of the group, the values in this one; null hides them.
  point(step) {
    this.together((one) => one.cursor(step));
    this.tip.replaceChildren();
    this.tip.classList.toggle("shown", known(step));
    if (!known(step)) return;
    add(this.tip, "b", {}, `step ${step}`);
    for (const [at, label] of this.all.marks) if (at === step) add(this.tip, "div", {}, label);
    let total = 0;
    this.all.curves.forEach((curve, index) => {
      const at = curve.x.indexOf(step);
      if (at < 0 || !known(curve.y[at])) return;
      total += curve.y[at];
      let words = said(curve.y[at]);
      if (known(curve.low[at])) words += ` [${said(curve.low[at])}, ${said(curve.high[at])}]`;
      const mean = this.means[index];
      if (mean) words += ` (mean ${said(mean[at])})`;
      const row = add(this.tip, "div");
      add(row, "i").style.background = curve.color;
      const several = this.all.curves.length > 1;
      add(row, "span", {}, several && curve.label ? `${curve.label} ${words}` : words);
    });
    if (this.all.stacked) add(this.tip, "div", {}, `together ${said(total)}`);
    const middle = (this.all.plot[0] + this.all.plot[2]) / 2;
    this.tip.classList.toggle("left", this.atX(step) > middle);
  }

  cursor(step) {
    this.step = step;
    const shown = known(step) && this.view.x[0] <= step && step <= this.view.x[1];
    this.line.classList.toggle("shown", shown);
    if (!shown) return;
    this.line.setAttribute("x1", this.atX(step));
    this.line.setAttribute("x2", this.atX(step));
  }

  // Shows the steps of a range, [low, high], with the y axis fitted to them; null for all.
  stretch(range) {
    const whole = this.all.x;
    let view = range && [clamp(range[0], whole), clamp(range[1], whole)];
    if (view && view[1] - view[0] > 0.98 * (whole[1] - whole[0])) view = null;
    const seen = view && this.extent(view);
    this.view = seen ? { x: view, y: seen } : { x: whole, y: this.all.y };
    this.figure.classList.toggle("zoomed", Boolean(seen));
    const [left, , , bottom] = this.all.plot;
    const times = (axis) =>
      (this.all[axis][1] - this.all[axis][0]) / (this.view[axis][1] - this.view[axis][0]);
    const [sx, sy] = [times("x"), times("y")];
    const [tx, ty] = [this.atX(whole[0]) - sx * left, this.atY(this.all.y[0]) - sy * bottom];
    const drawn = this.svg.querySelector(".data > g");
    drawn.setAttribute("transform", `matrix(${sx} 0 0 ${sy} ${tx} ${ty})`);
    this.axes();
    this.cursor(this.step);
  }

  // The range of values within steps, with some air; null if there is none.
  extent([low, high]) {
    const values = [];
    const totals = new Map();
    for (const curve of this.all.curves) {
      curve.x.forEach((x, at) => {
        if (x < low || x > high || !known(curve.y[at])) return;
        totals.set(x, (totals.get(x) ?? 0) + curve.y[at]);
        values.push(...[curve.y[at], curve.low[at], curve.high[at]].filter(known));
      });
    }
    const shown = this.all.stacked ? [...totals.values()] : values;
    if (!shown.length) return null;
    if (this.all.fromZero) shown.push(0);
    const least = shown.reduce((a, b) => Math.min(a, b));
    const most = shown.reduce((a, b) => Math.max(a, b));
    const air = 0.06 * (most - least) || Math.abs(most) / 10 || 1;
    return [least === 0 ? 0 : least - air, most === 0 ? 0 : most + air];
  }

  axes() {
    const [left, top, right, bottom] = this.all.plot;
    const across = this.svg.querySelector(".y-ticks");
    const along = this.svg.querySelector(".x-ticks");
    across.replaceChildren();
    along.replaceChildren();
    for (const [value, label] of ticks(...this.view.y, 6, 0)) {
      const y = this.atY(value);
      add(across, "line", { class: "grid", x1: left, x2: right, y1: y, y2: y });
      add(across, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, label);
    }
    for (const [value, label] of ticks(...this.view.x, Math.max(2, Math.floor(this.width / 75)), 1)) {
      const x = this.atX(value);
      add(along, "line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
      add(along, "text", { x, y: bottom + 17, "text-anchor": "middle" }, label);
    }
    this.svg.querySelectorAll(".marks line").forEach((mark, index) => {
      const x = this.atX(this.all.marks[index][0]);
      mark.style.display = left <= x && x <= right ? "" : "none";
      mark.setAttribute("x1", x);
      mark.setAttribute("x2", x);
    });
  }

  // Means over a share of all steps, 0 to 1, of the curves that may be smoothed.
  smooth(share) {
    const view = this.view;
    this.view = { x: this.all.x, y: this.all.y }; // the drawing's own coordinates
    const legend = [...this.svg.querySelectorAll("text")].find((one) => /^mean of/.test(one.textContent));
    this.all.curves.forEach((curve, index) => {
      if (!curve.smooth) return;
      const window = Math.round(share * curve.y.length);
      this.groups[index].querySelectorAll(".mean").forEach((one) => one.remove());
      this.groups[index].querySelector("g").classList.toggle("faint", window > 1);
      this.means[index] = window > 1 ? smoothed(curve.y, window) : null;
      if (legend) legend.textContent = `mean of ${Math.max(1, window * curve.stride)} steps`;
      if (!this.means[index]) return;
      const points = curve.x.map((x, at) => [x, this.means[index][at]]);
      const path = points.filter(([, y]) => known(y))
        .map(([x, y]) => `${this.atX(x).toFixed(1)} ${this.atY(y).toFixed(1)}`);
      add(this.groups[index], "path", { class: "line mean", d: `M${path.join("L")}` });
    });
    this.view = view;
  }

  listen() {
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      from = this.under(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const here = this.under(event);
      this.point(this.nearest(here));
      if (from === null) return;
      const [a, b] = [this.atX(Math.min(from, here)), this.atX(Math.max(from, here))];
      this.picked.setAttribute("x", a);
      this.picked.setAttribute("width", b - a);
    });
    this.svg.addEventListener("pointerup", (event) => {
      const here = this.under(event);
      const far = from !== null && Math.abs(this.atX(here) - this.atX(from)) > 8;
      if (far) {
        const range = [Math.min(from, here), Math.max(from, here)];
        this.together((one) => one.stretch(range));
      }
      from = null;
      this.picked.setAttribute("width", 0);
    });
    this.svg.addEventListener("pointerleave", () => {
      if (document.activeElement !== this.figure) this.point(null);
    });
    this.svg.addEventListener("dblclick", () => this.together((one) => one.stretch(null)));
    this.figure.addEventListener("blur", () => this.point(null));
    this.figure.addEventListener("keydown", (event) => this.pressed(event));
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = this.view.x;
    const seen = this.steps.filter((one) => low <= one && one <= high);
    const at = seen.indexOf(this.step);
    const move = (by) => this.point(seen[clamp(at < 0 && by < 0 ? seen.length - 1 : at + by,
      [0, seen.length - 1])]);
    const zoom = (by) => {
      const middle = known(this.step) ? this.step : (low + high) / 2;
      const half = ((high - low) * by) / 2;
      this.together((one) => one.stretch([middle - half, middle + half]));
    };
    const actions = {
      ArrowRight: () => move(event.shiftKey ? 10 : 1),
      ArrowLeft: () => move(event.shiftKey ? -10 : -1),
      Home: () => this.point(seen[0]),
      End: () => this.point(seen[seen.length - 1]),
      "+": () => zoom(0.5),
      "=": () => zoom(0.5),
      "-": () => zoom(2),
      Escape: () => this.together((one) => one.stretch(null)),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}

for (const box of document.querySelectorAll(".charts")) {
  const group = [...box.querySelectorAll("figure.plot")].map((figure) => new Chart(figure));
  if (!group.length) continue;
  group.forEach((one) => { one.group = group; });
  const controls = box.previousElementSibling;
  controls.hidden = false;
  const first = group.flatMap((one) => one.all.curves).find((curve) => curve.smooth);
  if (!first) continue;
  const slider = controls.querySelector("input");
  const show = () => { controls.querySelector("output").textContent = `${slider.value} % of the steps`; };
  slider.value = first.smooth > 1 ? (100 * first.smooth) / (first.stride * first.y.length) : 0;
  slider.closest("label").hidden = false;
  show();
  slider.addEventListener("input", () => {
    show();
    group.forEach((one) => one.smooth(slider.value / 100));
  });
}

// A live page is read again, but not from under somebody's hands.
const seconds = Number(document.documentElement.dataset.refresh);
if (seconds) {
  let still = Date.now();
  for (const kind of ["pointermove", "pointerdown", "keydown", "scroll"])
    addEventListener(kind, () => { still = Date.now(); }, { passive: true });
  setInterval(() => { if (Date.now() - still > 1000 * seconds) location.reload(); }, 1000);
}
