// The table of all models: search, filters, sorting and pages, because there may be thousands. Rows
// that remain keep their elements, and so the focus and scroll position.

import { key } from "./api.js";
import { choose } from "./chat.js";
import { manage } from "./manage.js";

const PAGE = 50;
const $ = (id) => document.getElementById(id);
const rows = new Map();
let models = [];
let managed = false;
const view = { page: 0, by: "id", down: false };

/** Show these models as they are now, for the administrator or not. */
export function show(now, administrator) {
  models = now;
  managed = administrator;
  countStates();
  draw();
}

function draw() {
  const wanted = $("search").value.trim().toLowerCase();
  const state = $("states").value;
  const found = models.filter(
    (model) => model.id.toLowerCase().includes(wanted) && (!state || stateOf(model) === state),
  );
  found.sort(order);
  view.page = Math.max(0, Math.min(view.page, Math.ceil(found.length / PAGE) - 1));
  const from = view.page * PAGE;
  place(found.slice(from, from + PAGE));
  const shown = `${count(from + 1)}–${count(Math.min(from + PAGE, found.length))}`;
  write($("shown"), found.length ? `${shown} of ${count(found.length)}` : "no matching models");
  $("back").disabled = !from;
  $("on").disabled = from + PAGE >= found.length;
}

function order(a, b) {
  const [base, other] = [a.parent === null, b.parent === null];
  if (base || other) return other - base; // the base is always first
  const [x, y] = view.by === "state" ? [stateOf(a), stateOf(b)] : [a[view.by], b[view.by]];
  if (x === y) return a.id < b.id ? -1 : 1;
  if (x == null || y == null) return x == null ? 1 : -1;
  return (x < y ? -1 : 1) * (view.down ? -1 : 1);
}

function place(shown) {
  const body = $("rows");
  const active = document.activeElement;
  const names = new Set(shown.map((model) => model.id));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
  shown.forEach((model, i) => {
    const row = rows.get(model.id) ?? made(model.id);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
    fill(row, model);
  });
  if (body.contains(active)) active.focus({ preventScroll: true }); // moved with its row
}

function made(name) {
  const row = $("row").content.cloneNode(true).firstElementChild;
  const link = row.querySelector("a");
  link.href = `v1/adapters/${encodeURIComponent(name)}/page`;
  link.addEventListener("click", openWithKey);
  for (const unseen of row.querySelectorAll(".unseen")) unseen.textContent = ` ${name}`;
  const [ask, change] = row.querySelectorAll("button");
  ask.addEventListener("click", () => choose(name));
  change.addEventListener("click", () => manage(models.find((model) => model.id === name)));
  rows.set(name, row);
  return row;
}

function fill(row, model) {
  const state = stateOf(model);
  const told = model.targets ? `alias of ${model.targets.map(share).join(", ")}` : state;
  const texts = [
    model.id,
    model.method,
    model.rank,
    null,
    model.running,
    model.waiting,
    model.tokens,
    model.first_token_ms == null ? null : `${Math.round(model.first_token_ms)} ms`,
    model.bytes == null ? null : size(model.bytes),
  ];
  texts.forEach((text, i) => i === 3 || write(row.cells[i], text));
  write(row.querySelector(".state"), model.pinned ? `${told}, pinned` : told);
  write(row.querySelector(".why"), (model.why ?? "").replace(/^\/\S*: /, "")); // manage: all of it
  row.dataset.state = state;
  row.querySelector("a").hidden = !model.page;
  const [ask, change] = row.querySelectorAll("button");
  ask.hidden = ["wrong", "unloaded", "quarantined"].includes(state);
  change.hidden = !managed || state === "base";
}

function countStates() {
  const counts = Map.groupBy(models, stateOf);
  for (const option of $("states").options) {
    if (!option.value) continue;
    option.hidden = option.dataset.administrator !== undefined && !managed;
    write(option, `${option.value} (${count(counts.get(option.value)?.length ?? 0)})`);
  }
}

function write(element, value) {
  const text = typeof value === "number" ? count(value) : (value ?? "–");
  if (element.textContent !== text) element.textContent = text;
}

const stateOf = (model) => (model.parent === null ? "base" : model.state);

const count = (number) => number.toLocaleString("en");

function share({ adapter, weight }, i, targets) {
  const all = targets.reduce((sum, target) => sum + target.weight, 0);
  return targets.length > 1 ? `${adapter} (${Math.round((100 * weight) / all)}%)` : adapter;
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  let i = 0;
  for (; bytes >= 1000 && i < units.length - 1; i++) bytes /= 1000;
  return `${bytes.toLocaleString("en", { maximumSignificantDigits: 3 })} ${units[i]}`;
}

// A link can't send the key, so a form does, which keeps the key out of URLs.
function openWithKey(event) {
  if (!key.get()) return;
  event.preventDefault();
  const form = $("opening");
  form.action = event.currentTarget.href;
  form.elements.key.value = key.get();
  form.submit();
  form.elements.key.value = "";
}

function turn(pages) {
  view.page += pages;
  draw();
  $("table").scrollTop = 0;
}

for (const id of ["search", "states"]) {
  $(id).addEventListener("input", () => {
    view.page = 0;
    draw();
  });
}
$("back").addEventListener("click", () => turn(-1));
$("on").addEventListener("click", () => turn(1));

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const { by } = button.dataset;
    // numbers start with the largest
    view.down = view.by === by ? !view.down : button.closest("th").classList.contains("number");
    view.by = by;
    for (const one of document.querySelectorAll("thead button")) {
      const sorted = one === button ? (view.down ? "descending" : "ascending") : "none";
      one.closest("th").ariaSort = sorted;
    }
    turn(0);
  });
}
