// The page: its sections in order, and the one thing that they share, the layer that charts point at.

/** The layer in focus. `watch` adds somebody who is told of it, under a name by which they are forgotten again. */
function shared(last) {
  const watchers = new Map();
  const state = {
    layer: 0,
    watch(name, tell) { watchers.set(name, [...(watchers.get(name) || []), tell]); },
    forget(name) { watchers.delete(name); },
    move(layer) {
      state.layer = Math.max(0, Math.min(last, layer));
      for (const tells of watchers.values()) tells.forEach((tell) => tell(state.layer));
    },
  };
  return state;
}

function summary(data) {
  const sum = data.summary;
  const words = Object.entries(sum.facts).map(([name, value]) => h("span", {}, h("b", {}, group(value)), ` ${name}`));
  const good = !sum.verdict.length;
  const ranks = sum.tp.length ? `, tensor parallel ${sum.tp.join(", ")}` : "";
  const said = good ? `${sum.target} takes it${ranks}` : `${sum.target} does not take it`;
  const warned = sum.warnings ? `, ${many(sum.warnings, "warning")}` : "";
  return h("header", {},
    h("p", { class: "eyebrow" }, "qc report"),
    h("h1", {}, data.title),
    h("p", { class: "facts" }, words),
    h("p", { class: `verdict ${!good ? "bad" : sum.warnings ? "careful" : "good"}` }, said + warned),
    h("div", { class: "cards", style: `--cards:${sum.noise ? 4 : 3}` },
      card("Bits per weight", sum.bits.toFixed(2), "linears of the blocks, scales counted"),
      card("On disk", sum.disk, `${sum.device} on the device`),
      card("Proofs", group(sum.proofs), sum.proofs ? `largest error ${digits(sum.worst)}, limit ${digits(data.limit)}` : "no rewrite claims to keep the function"),
      sum.noise ? card("Signal to noise", `${digits(sum.noise[1])} dB`, `median of the outputs, from ${digits(sum.noise[0])} to ${digits(sum.noise[2])}`) : null,
      h("div", { class: "card wide" }, h("h2", {}, "Linears"), stacked(sum.schemes))),
    h("nav", { "aria-label": "Sections" }));
}

function card(title, value, more) {
  return h("div", { class: "card" }, h("h2", {}, title), h("p", { class: "figure" }, value), h("p", { class: "small" }, more));
}

function stacked(schemes) {
  const total = schemes.reduce((sum, [, count]) => sum + count, 0);
  return [
    h("div", { class: "stack", "aria-hidden": "true" }, schemes.map(([, count, bits]) =>
      h("i", { class: `w${bits}`, style: `flex-grow:${count}` }))),
    h("ul", { class: "stack-names" }, schemes.map(([name, count, bits]) =>
      h("li", {}, h("i", { class: `w${bits}`, "aria-hidden": "true" }), h("b", {}, group(count)), ` ${name}`, h("span", { class: "small" }, ` ${Math.round(count / total * 100)} %`)))),
  ];
}

function certificatesSection(data) {
  const all = data.certificates.flatMap((c) => c.where.map((where, i) => ({ pass: c.pass, part: c.part[i], where, math: c.math[i], stored: c.stored[i] })));
  const body = data.certificates.map((c) => h("tr", {},
    h("th", { scope: "row" }, h("code", {}, c.pass)),
    h("td", { class: "number" }, group(c.math.length)),
    h("td", { class: "number" }, digits(Math.max(...c.math))),
    h("td", { class: "strip" }, strip(c, data.limit)),
    h("td", { class: "number" }, digits(Math.max(...c.stored)))));
  const shown = all.length ? [
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Proofs by pass" }, h("table", {},
      h("caption", { class: "out" }, "Proofs by pass"),
      h("thead", {}, h("tr", {}, ["Pass", "Proofs", "Largest error", "Errors of all proofs, limit to the right", "As stored"].map((title, i) =>
        h("th", { scope: "col", class: i && i !== 3 ? "number" : null }, title)))),
      h("tbody", {}, body))),
    folded(`All ${group(all.length)} proofs`, () => table("All proofs", [
      { title: "Pass", of: (r) => r.pass, show: (name) => h("code", {}, name) }, { title: "Part", of: (r) => r.part },
      { title: "Site", of: (r) => r.where },
      { title: "Error", of: (r) => r.math, number: true }, { title: "As stored", of: (r) => r.stored, number: true },
    ], all))] : [];
  return section("certificates", "Certificates",
    `Every rewrite that claims to keep the function was run before and after in float64, on the real weights. A relative error of ${digits(data.limit)} stops the compile. “As stored” is what casting to the dtype of the export adds.`,
    data.twin.map((text) => h("p", { class: "twin" }, sentence(text))), shown);
}

const STRIP = { from: -18, to: -8, step: 0.5, width: 260, height: 26 };

/** How many proofs have an error of which size, by half decades; the limit is a line. */
function strip(certificate, limit) {
  const bins = new Map();
  for (const error of certificate.math) {
    const power = error > 0 ? Math.log10(error) : STRIP.from;
    const bin = Math.max(STRIP.from, Math.floor(power / STRIP.step) * STRIP.step);
    bins.set(bin, (bins.get(bin) || 0) + 1);
  }
  const most = Math.max(...bins.values());
  const x = (power) => round((power - STRIP.from) / (STRIP.to - STRIP.from) * STRIP.width);
  const bars = [...bins].map(([bin, count]) => {
    const height = Math.max(3, Math.sqrt(count / most) * (STRIP.height - 6));
    return s("rect", { class: "bar", x: x(bin) + 0.5, y: round(STRIP.height - 3 - height), width: x(STRIP.from + STRIP.step) - 1, height: round(height), rx: 1 });
  });
  const edge = x(Math.log10(limit));
  return s("svg", { viewBox: `0 0 ${STRIP.width} ${STRIP.height}`, role: "img", "aria-label": `errors from ${digits(Math.min(...certificate.math))} to ${digits(Math.max(...certificate.math))}, limit ${digits(limit)}` },
    s("line", { class: "grid", x1: 0, x2: STRIP.width, y1: STRIP.height - 2.5, y2: STRIP.height - 2.5 }), bars,
    s("line", { class: "limit", x1: edge, x2: edge, y1: 1, y2: STRIP.height - 2 }));
}

function notesSection(data) {
  const warnings = data.notes.filter(([kind]) => kind === "warning").length;
  return section("notes", "Warnings and notes", warnings ? null : "No warnings.",
    h("ul", { class: "notes" }, data.notes.map(([kind, text]) => h("li", { class: kind }, h("b", {}, kind), h("span", {}, text)))));
}

function provenanceSection(data) {
  const from = data.provenance;
  const facts = { ...from.facts, ...from.versions, ...(from.remote_code.length ? { "Python code that ran": from.remote_code.join(", ") } : {}) };
  return section("provenance", "Provenance", "This command on the same files computes the same weights.",
    h("pre", { class: "command", tabindex: 0 }, from.command), pairs(facts),
    h("h3", {}, "Read"), files("Files that were read", from.inputs),
    h("h3", {}, "Written"), files("Files that were written", from.outputs));
}

function pairs(facts) {
  return h("dl", { class: "pairs" }, Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function files(caption, rows) {
  if (!rows.length) return h("p", { class: "small" }, "None: the model was in memory.");
  return table(caption, [
    { title: "File", of: (r) => r[0], show: (name) => h("code", {}, name) },
    { title: "Size", of: (r) => r[1], show: bytes, number: true },
    { title: "sha256", of: (r) => r[2], show: (hash) => h("code", { class: "hash" }, hash) },
  ], rows);
}

function timingsSection(data) {
  const run = data.run;
  if (!run) return null;
  const seconds = (value) => {
    const whole = Math.round(value);
    return whole >= 90 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${digits(value)} s`;
  };
  const stages = Object.entries(run.stages), most = Math.max(...stages.map(([, spent]) => spent));
  return section("timings", "This run", "What differs from run to run. It is on the page because --timings was given.",
    pairs({ "in all": seconds(run.seconds), "peak memory": bytes(run.peak_memory_bytes), host: run.host, threads: run.threads, finished: run.finished }),
    h("ul", { class: "bars" }, stages.map(([name, spent]) => h("li", {}, h("span", {}, name),
      h("i", { style: `--share:${most ? spent / most : 0}`, "aria-hidden": "true" }), h("span", { class: "number" }, seconds(spent))))));
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = shared(data.layers.length - 1);
  const sections = [passesSection(data, state), layersSection(data, state), trainingSection(data, state), certificatesSection(data),
    notesSection(data), provenanceSection(data), timingsSection(data)].filter(Boolean);
  const head = summary(data);
  head.querySelector("nav").append(...sections.map((one) => h("a", { href: `#${one.id}` }, one.querySelector("h2").textContent)));
  document.querySelector("main").append(head, ...sections);
  state.move(0);
  performance.mark("interactive");
}

start();
