// Elements, numbers and tables: what every section of the page is made of.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("p", {class: "note", onclick: f}, "text", other). Null children and null attributes are left out. */
function h(tag, attributes, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function s(tag, attributes, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

function furnish(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** A number with three digits: 1,234, 35.3, 0.0017, 9.5e-15. */
function digits(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  const places = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return group(value.toFixed(places)).replace("-", "−");
}

/** Thousands apart: 49,152. */
function group(text) {
  const [whole, part] = String(text).split(".");
  return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? "." + part : "");
}

/** Bytes for people. */
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return (unit ? digits(count) : count) + " " + units[unit];
}

/** "1 proof", "3 proofs". */
function many(count, word) {
  return `${group(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** A group of radio buttons that look like one control; `pick` is called with the index that is chosen. */
function choice(name, legend, labels, pick) {
  const inputs = labels.map((label, i) =>
    h("label", {}, h("input", { type: "radio", name, checked: i === 0, onchange: () => pick(i) }), h("span", {}, label)));
  return h("fieldset", { class: "choice" }, h("legend", {}, legend), inputs);
}

/** A slider with a label and the words for where it stands. */
function slider(label, last, say, move, attributes) {
  const output = h("output", {}, say(0));
  const input = h("input", { type: "range", min: 0, max: last, step: 1, value: 0, "aria-valuetext": say(0), ...attributes });
  const set = (at) => {
    input.value = at;
    input.setAttribute("aria-valuetext", say(at));
    output.textContent = say(at);
  };
  input.addEventListener("input", () => move(Number(input.value)));
  return { input, output, set, element: h("label", { class: "slider" }, h("span", {}, label), input, output) };
}

const FIRST = 200;

/** A table whose heads sort it. Columns are {title, of: row -> value, show: value -> node or text, number}. */
function table(caption, columns, rows) {
  const body = h("tbody", {});
  const more = h("button", { type: "button", class: "plain", onclick: () => fill(rows.length) }, `Show all ${group(rows.length)} rows`);
  let sorted = rows, column = -1, falling = false;
  const fill = (count) => {
    body.replaceChildren(...sorted.slice(0, count).map((row) => h("tr", {}, columns.map((c, i) => {
      const value = c.of(row), shown = c.show ? c.show(value) : c.number ? digits(value) : value ?? "–";
      return h(i ? "td" : "th", { class: c.number ? "number" : null, scope: i ? null : "row" }, shown);
    }))));
    more.hidden = count >= rows.length;
  };
  const heads = columns.map((c, i) => h("th", { scope: "col", class: c.number ? "number" : null },
    h("button", { type: "button", onclick: () => sort(i) }, c.title)));
  const sort = (i) => {
    falling = column === i ? !falling : Boolean(columns[i].number);
    column = i;
    const key = (row) => columns[i].of(row) ?? (columns[i].number ? -Infinity : "");
    sorted = [...rows].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (falling ? -1 : 1));
    heads.forEach((head, k) => {
      if (k === i) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    fill(FIRST);
  };
  fill(FIRST);
  const scroll = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: "out" }, caption), h("thead", {}, h("tr", {}, heads)), body));
  return h("div", {}, scroll, more);
}

/** Something that is made when it is first opened. */
function folded(summary, make) {
  const box = h("details", {}, h("summary", {}, summary));
  box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) box.append(make()); });
  return box;
}

/** A section of the page with its heading. */
function section(id, title, lead, ...children) {
  return h("section", { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title), lead ? h("p", { class: "lead" }, lead) : null, children);
}
