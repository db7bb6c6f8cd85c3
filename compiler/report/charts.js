// Charts: scales, lines and ticks as SVG of a fixed viewBox, so that nothing moves when the page is laid out.

/** A scale from values to 0..1 with ticks. Kinds: linear (from zero), log, and bent (asinh, for signed numbers). */
function scale(kind, values) {
  const found = values.filter((v) => v !== null && v !== undefined && (kind !== "log" || v > 0));
  if (!found.length) return null;
  let low = Math.min(...found), high = Math.max(...found);
  if (kind === "linear") {
    low = Math.min(0, low);
    const step = nice((high - low || 1) / 3);
    high = Math.ceil((high || 1) / step) * step;
    const ticks = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) ticks.push(v);
    return { at: (v) => (v - low) / (high - low), ticks };
  }
  const bend = kind === "log" ? Math.log10 : Math.asinh;
  const candidates = kind === "log" ? decades(low, high) : [-1e4, -100, -10, -1, 0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6];
  if (kind === "log" && candidates.length < 2) {
    low /= 1.5;
    high *= 1.5;
    candidates.splice(0, Infinity, ...[1, 2, 5].flatMap((m) => decades(low / 10, high).map((d) => m * d)));
  }
  low = Math.min(low, kind === "bent" ? -1 : low);
  high = Math.max(high, kind === "bent" ? 1 : high);
  const from = bend(low), width = bend(high) - from || 1, pad = 0.04;
  const at = (v) => pad + ((kind === "log" && v <= 0 ? from : bend(v)) - from) / width * (1 - 2 * pad);
  return { at, ticks: thin(candidates.filter((v) => v >= low && v <= high), 4) };
}

function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].find((m) => m * power >= step) * power;
}

function decades(low, high) {
  const found = [];
  for (let p = Math.ceil(Math.log10(low)); p <= Math.floor(Math.log10(high)); p += 1) found.push(Number(`1e${p}`));
  return found;
}

function thin(values, most) {
  const every = Math.ceil(values.length / most);
  return values.filter((_, i) => i % every === 0);
}

/** Ticks are short: 1k, 0.01, 1e−15. */
function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e3 && size < 1e6) return (value / 1e3 + "k").replace("-", "−");
  if (size && (size >= 1e6 || size < 1e-3)) return value.toExponential(0).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

const PLOT = { width: 300, height: 132, left: 38, right: 8, top: 8, bottom: 20 };

/** An empty plot: axes, ticks and a cursor. `x` and `y` give places of a value in the viewBox. */
function plot(label, last, vertical, box = PLOT, names = (i) => i) {
  const inner = { width: box.width - box.left - box.right, height: box.height - box.top - box.bottom };
  const x = (i) => box.left + (last ? i / last : 0.5) * inner.width;
  const y = (v) => box.top + (1 - vertical.at(v)) * inner.height;
  const svg = s("svg", { class: "plot", viewBox: `0 0 ${box.width} ${box.height}`, role: "img", "aria-label": label });
  for (const value of vertical.ticks) {
    svg.append(
      s("line", { class: "grid", x1: box.left, x2: box.width - box.right, y1: round(y(value)), y2: round(y(value)) }),
      s("text", { class: "tick end", x: box.left - 6, y: round(y(value) + 3.5) }, tick(value)));
  }
  for (const i of [...new Set([0, Math.round(last / 2), last])]) {
    svg.append(s("text", { class: "tick middle", x: round(x(i)), y: box.height - 5 }, names(i)));
  }
  const cursor = s("line", { class: "cursor", y1: box.top, y2: box.height - box.bottom });
  svg.append(cursor);
  const point = (i) => { cursor.setAttribute("x1", round(x(i))); cursor.setAttribute("x2", round(x(i))); };
  const under = (event) => {
    const frame = svg.getBoundingClientRect();
    const at = (event.clientX - frame.left) / frame.width * box.width;
    return Math.max(0, Math.min(last, Math.round((at - box.left) / inner.width * last)));
  };
  return { svg, x, y, point, under };
}

function round(value) {
  return Math.round(value * 10) / 10;
}

/** The path of a series with gaps where there is nothing. `pairs` are [x, y] in the viewBox, or null. */
function path(pairs) {
  let text = "", down = false;
  for (const pair of pairs) {
    if (!pair) { down = false; continue; }
    text += `${down ? "L" : "M"}${round(pair[0])} ${round(pair[1])}`;
    if (!down) text += "h0";
    down = true;
  }
  return text;
}

/** A line over the layers. */
function series(chart, values, name) {
  const pairs = values.map((v, i) => (v === null || v === undefined ? null : [chart.x(i), chart.y(v)]));
  return s("path", { class: `series ${name}`, d: path(pairs) });
}

/** Dots over the layers, each of a class of its own; none where they would run together. */
function dots(chart, values, name) {
  if (values.length > 90) return [];
  return values.map((v, i) => (v === null || v === undefined ? null
    : s("circle", { class: `dot ${name(i)}`, cx: round(chart.x(i)), cy: round(chart.y(v)), r: 2.4 })));
}
