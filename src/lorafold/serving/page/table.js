// The table of all models. Rows stay the same elements, so that focus and scroll stay too.

import { key } from "./api.js";

const body = document.getElementById("rows");
const rows = new Map();

/** Show these models as they are now. */
export function show(models) {
  const names = new Set(models.map((model) => model.id));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.remove();
    rows.delete(name);
  }
  models.forEach((model, i) => {
    const row = rows.get(model.id) ?? made(model.id);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
    fill(row, model);
  });
}

function made(name) {
  const row = document.getElementById("row").content.cloneNode(true).firstElementChild;
  const link = row.querySelector("a");
  link.href = `v1/adapters/${encodeURIComponent(name)}/page`;
  link.querySelector("span").textContent = ` ${name}`;
  link.addEventListener("click", openWithKey);
  rows.set(name, row);
  return row;
}

function fill(row, model) {
  const state = model.parent === null ? "base" : model.state;
  const texts = [
    model.id,
    model.method,
    model.rank,
    model.targets ? `alias of ${model.targets.map(share).join(", ")}` : state,
    model.running,
    model.waiting,
    model.tokens,
    model.first_token_ms == null ? null : `${Math.round(model.first_token_ms)} ms`,
    model.bytes == null ? null : size(model.bytes),
  ];
  texts.forEach((text, i) => write(row.cells[i], text));
  row.dataset.state = state;
  row.querySelector("a").hidden = !model.page;
}

function write(cell, value) {
  const text = typeof value === "number" ? value.toLocaleString("en") : (value ?? "–");
  if (cell.textContent !== text) cell.textContent = text;
}

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

// A link can't send the key, so that a form does: the key is in no address.
function openWithKey(event) {
  if (!key.get()) return;
  event.preventDefault();
  const form = document.getElementById("opening");
  form.action = event.currentTarget.href;
  form.elements.key.value = key.get();
  form.submit();
  form.elements.key.value = "";
}
