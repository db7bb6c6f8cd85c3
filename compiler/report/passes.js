// The slider over the passes: one part of the model before the first pass, and after each one.

function passesSection(data, state) {
  const last = data.steps.length, parts = data.parts;
  const view = { step: 0, part: Math.max(0, parts.findIndex((part) => part.block)) };
  const drawing = h("div", { class: "drawing", tabindex: 0, role: "region", "aria-label": "Diagram" });
  const diff = h("div", { class: "diff", tabindex: 0, role: "region", "aria-label": "Text diff" });
  const done = h("ul", { class: "done" });
  const captions = [captured(data), ...data.steps.map((step, i) => caption(step, i))];
  const say = (at) => (at ? `after ${data.steps[at - 1].name}` : "as captured");
  const go = (at) => { view.step = Math.max(0, Math.min(last, at)); draw(); };
  const control = slider("Pass", last, say, go, { "aria-label": "Pass" });
  const back = h("button", { type: "button", "aria-label": "Previous pass", onclick: () => go(view.step - 1) }, "←");
  const next = h("button", { type: "button", "aria-label": "Next pass", onclick: () => go(view.step + 1) }, "→");
  const stops = h("ol", { class: "stops", style: `--stops:${last + 1}` }, captions.map((_, i) =>
    h("li", {}, h("button", { type: "button", tabindex: -1, onclick: () => go(i) }, i ? data.steps[i - 1].name : "captured"))));
  const picker = parts.length > 4 ? selector(parts, view.part, (i) => { view.part = i; draw(); })
    : choice("part", "Part of the model", parts.map((part) => part.title), (i) => { view.part = i; draw(); });
  const radios = picker.querySelectorAll("input");
  if (radios.length) radios[view.part].checked = true;

  let shown = null;
  function draw() {
    const part = parts[view.part], at = view.step;
    control.set(at);
    back.disabled = at === 0;
    next.disabled = at === last;
    stops.querySelectorAll("button").forEach((button, i) => button.classList.toggle("here", i === at));
    captions.forEach((one, i) => one.classList.toggle("here", i === at));
    if (shown !== part.states[at]) drawing.innerHTML = data.drawings[part.states[at]];
    if (shown !== part.states[at]) drawing.scrollLeft = (drawing.scrollWidth - drawing.clientWidth) / 2;
    shown = part.states[at];
    const lines = at ? part.diffs[at - 1] : part.text;
    diff.replaceChildren(at ? (lines.length ? changes(lines) : h("p", { class: "nothing" }, "No row of this part changes."))
      : h("pre", {}, lines.map((line) => h("span", { class: "row" }, line))));
    const told = at ? part.rewrites[at - 1] : [];
    done.replaceChildren(...(told.length ? told : [at ? "No rewrite in this part." : "Nothing yet."]).map((text) => h("li", {}, text)));
    diff.scrollTop = 0;
  }
  draw();
  return section("passes", "Passes",
    "Move the slider to see what every pass does to a part of the model. Parts that go the same way are shown once.",
    data.parts_left_out ? h("p", { class: "small" }, `${many(data.parts_left_out, "rarer kind")} of parts left out.`) : null,
    h("div", { class: "before-rail" }, picker),
    h("div", { class: "rail" }, h("div", { class: "steps", style: `--stops:${last + 1}` }, back, control.element, next), stops),
    h("div", { class: "captions", "aria-live": "polite" }, captions),
    h("div", { class: "stage" },
      h("figure", { class: "panel whole" }, h("figcaption", {}, "Diagram"), drawing),
      h("figure", { class: "panel" }, h("figcaption", {}, "Text, before and after"), diff),
      h("figure", { class: "panel" }, h("figcaption", {}, "Rewrites"), h("div", { class: "rewrites", tabindex: 0, role: "region", "aria-label": "Rewrites" }, done))));
}

function selector(parts, chosen, pick) {
  const options = parts.map((part, i) => h("option", { value: i, selected: i === chosen }, part.title));
  return h("label", { class: "select" }, h("span", {}, "Part of the model"),
    h("select", { onchange: (event) => pick(Number(event.target.value)) }, options));
}

function captured(data) {
  return h("div", { class: "caption" }, h("h3", {}, "As captured"),
    h("p", {}, `The graph of ${data.title} before any pass, with the patterns that are found in it.`));
}

function caption(step, i) {
  const claim = step.claim === "exact" && step.proofs
    ? `${many(step.proofs, "proof")}, largest error ${digits(step.math)}` : step.formats;
  return h("div", { class: "caption" },
    h("h3", {}, h("span", { class: "ordinal" }, i + 1), " ", h("code", {}, step.spelled), " ",
      h("span", { class: `claim ${step.claim}` }, step.claim)),
    h("p", {}, sentence(step.summary)),
    h("p", { class: "small" }, [step.found, claim, ...step.notes].filter(Boolean).join(" · ")));
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + ".";
}

/** A unified diff; in lines that replace each other the middle that differs is marked. */
function changes(lines) {
  const rows = [];
  for (let i = 0; i < lines.length; i += 1) {
    const kind = lines[i][0];
    if (kind !== "-") { rows.push(row(lines[i])); continue; }
    let gone = i;
    while (gone < lines.length && lines[gone][0] === "-") gone += 1;
    let come = gone;
    while (come < lines.length && lines[come][0] === "+") come += 1;
    const before = lines.slice(i, gone), after = lines.slice(gone, come);
    before.forEach((line, k) => rows.push(row(line, after[k])));
    after.forEach((line, k) => rows.push(row(line, before[k])));
    i = come - 1;
  }
  return h("pre", {}, rows);
}

function row(line, other) {
  const name = { "+": "plus", "-": "minus", "@": "hunk" }[line[0]] || "same";
  if (!other) return h("span", { class: `row ${name}` }, line);
  const most = Math.min(line.length, other.length);
  let start = 1, end = 0;
  while (start < most && line[start] === other[start]) start += 1;
  while (end < most - start && line[line.length - 1 - end] === other[other.length - 1 - end]) end += 1;
  return h("span", { class: `row ${name}` }, line.slice(0, start), h("mark", {}, line.slice(start, line.length - end)), line.slice(line.length - end));
}
