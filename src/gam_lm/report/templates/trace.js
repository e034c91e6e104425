"use strict";
// A sheet is read when it is turned to; text only ever goes into the page as text.
const $ = (id) => document.getElementById(id);
const names = JSON.parse($("names").textContent);
const blocks = document.querySelectorAll("script.sheet");
const held = new Map();
const view = { sheet: -1, layer: names.length - 1, chosen: 0, shown: 0 };

function sheet(number) {
  if (!held.has(number)) {
    if (held.size > 3) held.delete(held.keys().next().value);
    held.set(number, JSON.parse(blocks[number].textContent));
  }
  return held.get(number);
}
const token = (index) => sheet(Math.floor(index / SIZE))[index % SIZE];
const count = (blocks.length - 1) * SIZE + sheet(blocks.length - 1).length;
const element = (index) => $("text").children[index - view.sheet * SIZE];
const visible = (text) => text.replace(/\r?\n/g, "↵") || "∅";
const percent = (share) => (100 * share).toFixed(1) + " %";
const number = (value) => String(Number(value.toPrecision(4)));

function value(each) {
  const name = $("colour").value;
  if (name === "surprise (nats)") return each.surprise_nats;
  const place = names[view.layer].indexOf(name);
  return place < 0 ? null : each.layers[view.layer].figures[place];
}

function paint() {
  const values = sheet(view.sheet).map(value);
  const known = values.filter((each) => each !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  values.forEach((each, i) => {
    const strength = each === null ? 0 : high > low ? (each - low) / (high - low) : 0.5;
    $("text").children[i].style.setProperty("--value", (0.6 * strength).toFixed(3));
  });
  $("scale").textContent = known.length ? `pale is ${number(low)}, dark is ${number(high)}` : "this layer has no such figure";
}

function turn(to, choose) {
  to = Math.max(0, Math.min(blocks.length - 1, to));
  if (to !== view.sheet) {
    view.sheet = to;
    $("text").replaceChildren(...sheet(to).map((each) => {
      const span = document.createElement("span");
      span.textContent = each.text.replace(/\r?\n/g, "↵\n") || "∅";
      span.setAttribute("role", "option");
      span.dataset.index = each.index;
      return span;
    }));
    $("sheet").value = to + 1;
    $("before").disabled = to === 0;
    $("after").disabled = to === blocks.length - 1;
    paint();
    heat();
  }
  select(choose ?? to * SIZE);
}

function select(index, focus) {
  for (const each of $("text").children) {
    const chosen = Number(each.dataset.index) === index;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
  }
  view.chosen = index;
  if (focus) element(index).focus();
  show(index);
}

function table(caption, head, rows) {
  const made = document.createElement("table");
  made.createCaption().textContent = caption;
  const line = made.createTHead().insertRow();
  for (const name of head) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    line.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const next = body.insertRow();
    row.forEach((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = text;
      next.append(cell);
    });
  }
  return made;
}

function show(index) {
  const each = token(index), layer = each.layers[view.layer];
  view.shown = index;
  for (const span of $("text").children) span.classList.remove("source", "tap");
  for (const [place, share] of layer.sources ?? []) {
    const span = element(place);
    if (span) { span.classList.add("source"); span.style.setProperty("--share", (0.35 + 0.65 * share).toFixed(3)); }
  }
  for (const [place] of layer.taps ?? []) element(place)?.classList.add("tap");

  const surprise = each.surprise_nats === null ? "it came first" : `surprise ${number(each.surprise_nats)} nats`;
  $("token-name").textContent = `“${visible(each.text)}” ${surprise}`;
  const from = (pairs) => pairs.map(([place, share]) => [visible(token(place).text), String(place), percent(share)]);
  const others = { "read from the bank": "the learned bank", "read from before": "older tokens" };
  const rest = Object.entries(others).map(([name, what]) => [what, names[view.layer].indexOf(name)]).filter(([, place]) => place >= 0)
    .map(([what, place]) => [what, "", percent(layer.figures[place])]);
  const parts = [
    table(`Place ${index}, token ${each.id}; what the model expected next`, ["Token", "Chance"], each.predictions.map(([text, share]) => [visible(text), percent(share)])),
  ];
  if (layer.sources || rest.length) parts.push(table("Read from the memory: who wrote it", ["Token", "Place", "Share"], [...from(layer.sources ?? []), ...rest]));
  if (layer.taps) parts.push(table("Brought by the convolution", ["Token", "Place", "Share"], from(layer.taps)));
  for (const [memory, slots] of Object.entries(layer.slots)) {
    parts.push(table(`Slots read in the ${memory} memory`, ["Slot", "Share"], slots.map(([slot, share]) => [String(slot), percent(share)])));
  }
  if (layer.writes) parts.push(table("Slots written", ["Slot", "Share"], layer.writes.map(([slot, share]) => [String(slot), percent(share)])));
  parts.push(table(`Layer ${view.layer}`, ["Figure", "Value"], names[view.layer].map((name, i) => [name, number(layer.figures[i])])));
  $("token").replaceChildren(...parts);
  $("story").textContent = story(index, view.layer);
  arcs();
  mark();
}

// Where the same token stands earlier in the sheet: itself the source, or just before it, for a token's key is at first that of the token before.
function returned(index, place) {
  if (token(place).id === token(index).id) return place;
  return place % SIZE && token(place - 1).id === token(index).id ? place - 1 : -1;
}

// The source of which the story tells: the first that the same token's earlier place explains, or else the largest.
function told(index, layer) {
  const sources = (token(index).layers[layer].sources ?? []).filter(([place]) => place < index);
  return sources.find(([place]) => returned(index, place) >= 0) ?? sources[0];
}

function story(index, layer) {
  const quoted = (place) => `“${visible(token(place).text).trim()}” (place ${place})`;
  if (!token(index).layers[layer].sources) return `Layer ${layer} names no earlier token that ${quoted(index)} read from a memory.`;
  const found = told(index, layer);
  if (!found) return `In layer ${layer}, ${quoted(index)} read nothing that an earlier token wrote.`;
  const [place, share] = found, before = returned(index, place);
  const read = `${percent(share)} of what layer ${layer} reads from its memory at ${quoted(index)} was written by ${quoted(place)}, ${index - place} token${index - place > 1 ? "s" : ""} earlier`;
  if (before < 0) return `${read}.`;
  return before === place ? `${read}. It is the same token: it returns.` : `${read}. That token followed ${quoted(before)}: the same token returns, and the memory gives what came after it.`;
}

// A first look: the token of the sheet that reads most of what was written where the same token stood before. Names come before other words.
function first() {
  let best = null;
  for (const each of sheet(0)) {
    const word = each.text.trim(), weight = /^\p{Lu}\p{L}{2}/u.test(word) ? 4 : /^\p{L}{3}/u.test(word) ? 2 : /\p{L}/u.test(word) ? 1 : 0;
    each.layers.forEach((layer, number) => {
      for (const [place, share] of layer.sources ?? []) {
        if (place < each.index - 1 && returned(each.index, place) >= 0 && weight * share > (best?.score ?? 0)) best = { score: weight * share, index: each.index, layer: number };
      }
    });
  }
  return best;
}

// Arcs from the token that reads to those that wrote, as thick as their shares; a tap of the convolution is no arc.
function arcs() {
  const box = $("text").getBoundingClientRect(), reader = element(view.shown), drawn = [];
  $("arcs").setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  $("arcs").setAttribute("width", box.width);
  $("arcs").setAttribute("height", box.height);
  // A token that is broken over two lines is met where it begins.
  const at = (span) => { const r = span.getClientRects()[0]; return [r.left + r.width / 2 - box.left, r.top - box.top + 3]; };
  const [x, y] = at(reader);
  for (const [place, share] of token(view.shown).layers[view.layer].sources ?? []) {
    const span = place === view.shown ? null : element(place);
    if (!span) continue;
    const [to, down] = at(span), high = Math.min(y, down) - Math.min(20, 8 + Math.abs(x - to) / 12);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x} ${y}C${x} ${high} ${to} ${high} ${to} ${down}`);
    path.setAttribute("stroke-width", (1 + 6 * share).toFixed(2));
    path.dataset.place = place;
    path.classList.toggle("told", place === told(view.shown, view.layer)?.[0]);
    drawn.push(path);
  }
  $("arcs").replaceChildren(...drawn);
}

// The memory over time: a column for each token, a row for each slot or a few neighbours; how far it is from what the model learned, of the layer's most.
function heat() {
  const held = sheet(view.sheet).map((each) => each.layers[view.layer].held ?? []), rows = held[0].length, canvas = $("heat");
  $("heat-figure").hidden = !rows;
  if (!rows) return;
  [canvas.width, canvas.height] = [held.length, rows];
  const most = Math.max(...held.flat()) || 1, context = canvas.getContext("2d"), image = context.createImageData(held.length, rows);
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--mark").split(",").map(Number);
  held.forEach((column, t) => column.forEach((each, row) => image.data.set([r, g, b, Math.round(255 * each / most)], 4 * (row * held.length + t))));
  context.putImageData(image, 0, 0);
  $("heat-first").textContent = `token ${view.sheet * SIZE}`;
  $("heat-last").textContent = `token ${view.sheet * SIZE + held.length - 1}`;
  $("heat-most").textContent = number(most);
  canvas.setAttribute("aria-label", `What the memory of layer ${view.layer} holds after each of ${held.length} tokens, in ${rows} rows of slots`);
}

function mark() {
  const count = sheet(view.sheet).length, place = view.shown - view.sheet * SIZE;
  $("heat-now").style.left = `${100 * place / count}%`;
  $("heat-now").style.width = `${100 / count}%`;
}

function pointed(event) {
  const box = $("heat").getBoundingClientRect(), count = sheet(view.sheet).length;
  return view.sheet * SIZE + Math.max(0, Math.min(count - 1, Math.floor((event.clientX - box.left) / box.width * count)));
}

function layer() {
  view.layer = Number($("layer").value);
  $("layer-name").textContent = `${view.layer} (0 to ${names.length - 1})`;
  paint();
  heat();
  show(view.shown);
}

function begin() {
  const found = first();
  if (found) { $("layer").value = found.layer; view.layer = found.layer; }
  view.sheet = -1;
  turn(0, found?.index);
  layer();
  if (!found && token(0).layers.some((each) => each.sources)) $("story").textContent = "In this text no token reads what was written where the same token stood before: try one in which a name returns.";
}

for (const name of ["surprise (nats)", ...new Set(names.flat())]) $("colour").add(new Option(name));
$("pages").hidden = blocks.length === 1;
$("sheet").max = blocks.length;
$("sheets").textContent = `of ${blocks.length}, ${count} tokens`;
$("text").addEventListener("pointerover", (event) => { if (event.target.dataset.index) show(Number(event.target.dataset.index)); });
$("text").addEventListener("pointerleave", () => show(view.chosen));
$("text").addEventListener("click", (event) => { if (event.target.dataset.index) select(Number(event.target.dataset.index), true); });
$("text").addEventListener("keydown", (event) => {
  const start = view.sheet * SIZE, end = start + sheet(view.sheet).length - 1;
  const to = { ArrowLeft: view.chosen - 1, ArrowRight: view.chosen + 1, Home: start, End: end, PageUp: start - SIZE, PageDown: start + SIZE }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(count - 1, to));
  turn(Math.floor(index / SIZE), index);
  element(index).focus();
});
$("colour").addEventListener("change", paint);
$("layer").addEventListener("input", layer);
$("before").addEventListener("click", () => turn(view.sheet - 1));
$("after").addEventListener("click", () => turn(view.sheet + 1));
$("sheet").addEventListener("change", () => turn(Number($("sheet").value) - 1));
document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
$("heat").addEventListener("pointermove", (event) => show(pointed(event)));
$("heat").addEventListener("pointerleave", () => show(view.chosen));
$("heat").addEventListener("click", (event) => select(pointed(event)));
$("first").addEventListener("click", begin);
addEventListener("resize", arcs);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", heat);
begin();
