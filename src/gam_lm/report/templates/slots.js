"use strict";
const $ = (id) => document.getElementById(id);
const layers = JSON.parse($("layer").dataset.layers);
const memories = [...document.querySelectorAll(".memory")];
const FIRST = 24; // slots shown before all are asked for
let all = false;

function show() {
  const layer = layers[Number($("layer").value)], wanted = $("find").value.toLowerCase();
  $("layer-name").textContent = `${layer} (${layers[0]} to ${layers[layers.length - 1]})`;
  let shown = 0, found = 0;
  for (const memory of memories) {
    memory.hidden = Number(memory.dataset.layer) !== layer;
    for (const row of memory.hidden ? [] : memory.querySelectorAll("tbody tr")) {
      const dead = [...row.cells].some((cell) => cell.textContent === "dead");
      const fits = !($("alive").checked && dead) && row.textContent.toLowerCase().includes(wanted);
      found += fits;
      row.hidden = !fits || (!all && found > FIRST);
      shown += !row.hidden;
    }
  }
  $("shown").textContent = shown < found ? `${shown} of ${found} slots shown` : `${shown} slots shown`;
  $("all").hidden = shown === found;
}

// A column's number, or its text; what is empty comes last.
const key = (row, place) => {
  const text = row.cells[place].textContent, number = parseFloat(text.replace(/,/g, ""));
  return text === "" ? null : Number.isNaN(number) ? text : number;
};

function sort(table, place) {
  const heads = [...table.tHead.rows[0].cells];
  const descending = heads[place].getAttribute("aria-sort") !== "descending";
  heads.forEach((head, i) => (i === place ? head.setAttribute("aria-sort", descending ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, place), row]);
  rows.sort(([a], [b]) => (a === null) - (b === null) || (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  show();
}

for (const memory of memories) {
  const table = memory.querySelector("table");
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(table, place));
    head.replaceChildren(button);
  });
  table.tHead.rows[0].cells[1].setAttribute("aria-sort", "descending");
}
// On a narrow screen a row is a card, and each figure says what it is.
for (const table of document.querySelectorAll("table")) {
  const names = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, place) => { cell.dataset.name = names[place]; });
}
$("all").addEventListener("click", () => { all = true; show(); });
for (const id of ["layer", "find", "alive"]) $(id).addEventListener("input", show);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
show();
