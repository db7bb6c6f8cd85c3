// Charts layer by layer: one small plot for every kind of linear, all on one scale, with one cursor.

const METRICS = [
  { label: "Output noise", unit: "dB", kind: "linear", now: (l) => l.sqnr,
    lead: "Signal to quantization noise of what each linear computes, input and weight on their grids. Higher is better; 6 dB are one bit." },
  { label: "Weight noise", unit: "dB", kind: "linear", now: (l) => l.weight_sqnr,
    lead: "Signal to quantization noise of the weight alone, before it meets an input." },
  { label: "Weight range", unit: "", kind: "log", ...beforeAndAfter("weight", largest),
    lead: "The largest magnitude in the weight, before all passes and after all passes that keep it float." },
  { label: "Input range", unit: "", kind: "log", ...beforeAndAfter("input", largest),
    lead: "The largest magnitude that the linear reads, before and after the passes." },
  { label: "Weight kurtosis", unit: "", kind: "bent", ...beforeAndAfter("weight", tails),
    lead: "Excess kurtosis of the weight: 0 for a normal distribution, large where a few values stand far out." },
  { label: "Input kurtosis", unit: "", kind: "bent", ...beforeAndAfter("input", tails),
    lead: "Excess kurtosis of what the linear reads: 0 for a normal distribution. Outliers here are what smoothing and rotations take away." },
];

function beforeAndAfter(what, of) {
  return { was: (l) => of(l[what].before), now: (l) => of(l[what].after) };
}

function largest(spread) {
  return spread.high.map((high, i) => (high === null ? null : Math.max(Math.abs(high), Math.abs(spread.low[i]))));
}

function tails(spread) {
  return spread.kurtosis;
}

function there(values) {
  return values.some((v) => v !== null && v !== undefined);
}

function layersSection(data, state) {
  const last = data.layers.length - 1;
  const metrics = METRICS.filter((metric) => data.linears.some((l) => there(metric.now(l))));
  const lead = h("p", { class: "lead reserve" });
  const legend = h("p", { class: "legend" });
  const grid = h("div", { class: "grid-of-plots" });
  const pick = (index) => {
    const metric = metrics[index];
    lead.textContent = metric.lead;
    legend.replaceChildren(...legendOf(metric, data));
    state.forget("layers");
    grid.replaceChildren(...panels(metric, data, state, last));
    state.move(state.layer);
  };
  const control = layerSlider(data, state);
  const box = section("layers", "Layer by layer", null, lead,
    h("div", { class: "tools" }, choice("metric", "What is shown", metrics.map((m) => m.label), pick), control), legend, grid,
    folded("All linears as a table", () => linearTable(data)));
  pick(0);
  return box;
}

function legendOf(metric, data) {
  const found = [];
  if (metric.was) found.push(swatch("before", "before"));
  const names = { 16: "float", 8: "8-bit weights", 4: "4-bit weights" };
  const bits = [...new Set(data.linears.flatMap((l) => l.bits))].filter((b) => b !== null).sort((a, b) => b - a);
  for (const b of bits) {
    if (b === 16 && !metric.was) continue;
    found.push(swatch(`w${b}`, (metric.was ? "after, " : "") + (names[b] || `${b}-bit weights`)));
  }
  if (data.linears.some((l) => l.experts > 1)) found.push(h("span", {}, "Of experts the worst is shown."));
  return found;
}

function swatch(name, text) {
  return h("span", { class: "swatch" }, s("svg", { viewBox: "0 0 22 10", width: 22, height: 10, "aria-hidden": "true" },
    s("path", { class: `series ${name}`, d: "M1 5H21" }),
    name === "before" ? null : s("circle", { class: `dot ${name}`, cx: 11, cy: 5, r: 2.6 })), text);
}

function panels(metric, data, state, last) {
  const all = data.linears.flatMap((l) => [...metric.now(l), ...(metric.was ? metric.was(l) : [])]);
  const vertical = scale(metric.kind, all);
  return data.linears.filter((l) => there(metric.now(l))).map((l) => {
    const now = metric.now(l), was = metric.was ? metric.was(l) : null;
    const chart = plot(`${metric.label} of ${l.kind} by layer`, last, vertical);
    const widths = [...new Set(l.bits.filter((b) => b !== null))];
    if (was) chart.svg.append(series(chart, was, "before"));
    chart.svg.append(series(chart, now, widths.length === 1 ? `w${widths[0]}` : "mixed"));
    chart.svg.append(...dots(chart, now, (i) => `w${l.bits[i]}`).filter(Boolean));
    const value = h("span", { class: "value" });
    const show = (i) => {
      chart.point(i);
      value.textContent = now[i] === null ? "–"
        : was ? `${digits(was[i])} → ${digits(now[i])}` : `${digits(now[i])} ${metric.unit}`;
    };
    state.watch("layers", show);
    chart.svg.addEventListener("pointermove", (event) => state.move(chart.under(event)));
    chart.svg.addEventListener("pointerdown", (event) => state.move(chart.under(event)));
    const formats = [...new Set(l.format.filter(Boolean))];
    return h("figure", { class: "panel plot-panel" },
      h("figcaption", {}, h("code", {}, l.kind, l.experts > 1 ? ` ×${l.experts}` : ""), h("span", { class: "format" }, formats.join(", ")), value),
      chart.svg);
  });
}

/** A slider for the layer that all charts point at. */
function layerSlider(data, state) {
  const control = slider("Layer", data.layers.length - 1, (i) => data.layers[i], state.move);
  state.watch("slider", control.set);
  return control.element;
}

function linearTable(data) {
  const rows = data.layers.flatMap((layer, i) => data.linears.filter((l) => l.bits[i] !== null).map((l) => ({ l, i, layer })));
  const number = (title, of) => ({ title, of, number: true });
  const weight = METRICS[2], input = METRICS[3], tail = METRICS[5];
  const columns = { weight: new Map(), input: new Map() };
  const cached = (metric, which, what) => (r) => {
    const key = `${what}${which}`;
    columns[key] = columns[key] || new Map();
    if (!columns[key].has(r.l)) columns[key].set(r.l, metric[which](r.l));
    return columns[key].get(r.l)[r.i];
  };
  return table("All linears", [
    { title: "Linear", of: (r) => `${r.layer}.${r.l.kind}`, show: (name) => h("code", {}, name) },
    { title: "Format", of: (r) => r.l.format[r.i] },
    number("Output, dB", (r) => r.l.sqnr[r.i]),
    number("Weight, dB", (r) => r.l.weight_sqnr[r.i]),
    number("Weight range before", cached(weight, "was", "w")),
    number("after", cached(weight, "now", "w")),
    number("Input range before", cached(input, "was", "x")),
    number("after", cached(input, "now", "x")),
    number("Input kurtosis before", cached(tail, "was", "k")),
    number("after", cached(tail, "now", "k")),
  ], rows);
}

/** Losses of passes that train: before and after over the layers, and the curve of one layer. */
function trainingSection(data, state) {
  if (!data.losses.length) return null;
  return section("training", "Training",
    "Relative error of a block's output while a pass trains in it, on calibration text that it does not train on. The best state is kept, the untrained one included.",
    data.losses.map((losses) => training(losses, data, state)), h("div", { class: "tools" }, layerSlider(data, state)));
}

function training(losses, data, state) {
  const last = data.layers.length - 1;
  const held = losses.layers.map((curves) => (curves ? curves["held-out loss"] : null));
  const start = held.map((curve) => (curve ? curve[0][1] : null));
  const best = held.map((curve) => (curve ? Math.min(...curve.map(([, loss]) => loss).filter((loss) => loss !== null)) : null));
  const box = { ...PLOT, width: 560, height: 200 };
  const chart = plot(`Held-out loss of ${losses.pass} by layer, before and after training`, last, scale("log", [...start, ...best]), box);
  chart.svg.append(series(chart, start, "before"), series(chart, best, "w4"), ...dots(chart, best, () => "w4").filter(Boolean));
  const value = h("span", { class: "value" });
  const curve = h("div", { class: "curve" });
  const name = h("code", {});
  const gain = h("span", { class: "value" });
  state.watch("training", (i) => {
    chart.point(i);
    value.textContent = held[i] ? `${digits(start[i])} → ${digits(best[i])}` : "–";
    name.textContent = data.layers[i];
    gain.textContent = held[i] ? `${digits((best[i] / start[i] - 1) * 100)} %` : "not trained";
    curve.replaceChildren(held[i] ? curveOf(losses.layers[i]) : s("svg", { class: "plot", viewBox: "0 0 560 200" }));
  });
  chart.svg.addEventListener("pointermove", (event) => state.move(chart.under(event)));
  return h("div", { class: "pair" },
    h("figure", { class: "panel plot-panel" },
      h("figcaption", {}, h("code", {}, losses.pass), h("span", { class: "format" }, "before and after, by layer"), value), chart.svg),
    h("figure", { class: "panel plot-panel" },
      h("figcaption", {}, name, h("span", { class: "format" }, "step by step: held-out line, training dots"), gain), curve));
}

function curveOf(curves) {
  const held = curves["held-out loss"], steps = curves["training loss"] || [];
  const last = Math.max(held[held.length - 1][0], 1);
  const box = { ...PLOT, width: 560, height: 200 };
  const chart = plot("Loss by step", last, scale("log", [...held, ...steps].map(([, loss]) => loss)), box);
  for (const [step, loss] of steps) {
    if (loss !== null) chart.svg.append(s("circle", { class: "dot before", cx: round(chart.x(step)), cy: round(chart.y(loss)), r: 2.4 }));
  }
  const pairs = held.map(([step, loss]) => (loss === null ? null : [chart.x(step), chart.y(loss)]));
  chart.svg.append(s("path", { class: "series w4", d: path(pairs) }),
    pairs.filter(Boolean).map(([x, y]) => s("circle", { class: "dot w4", cx: round(x), cy: round(y), r: 3 })));
  return chart.svg;
}
