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
}

function layer() {
  view.layer = Number($("layer").value);
  $("layer-name").textContent = `${view.layer} (0 to ${names.length - 1})`;
  paint();
  show(view.shown);
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
turn(0);
layer();
