// The dialog in which the administrator manages an adapter or an alias.

import { Refusal, order } from "./api.js";

const $ = (id) => document.getElementById(id);
const dialog = $("manage");
let known = new Map();
let managed = null; // the model in the dialog; a new alias has no id

/** Open the dialog for a model, or for a new alias. */
export function manage(model) {
  managed = model;
  const alias = model.state === "alias";
  $("acts").hidden = alias;
  $("alias").hidden = !alias;
  $("alias-name").value = model.id ?? "";
  $("alias-name").readOnly = Boolean(model.id);
  $("targets").replaceChildren();
  if (alias) {
    (model.targets ?? [{ adapter: "", weight: 1 }]).forEach(addTarget);
    const served = [...known.values()].filter((one) => one.digest);
    $("names").replaceChildren(...served.map(({ id }) => new Option(id)));
  }
  for (const button of dialog.querySelectorAll("[data-of-old]")) button.hidden = !model.id;
  tell("");
  refresh(model);
  dialog.showModal();
}

/** Show the model of the open dialog as it is among these now, by name. */
export function follow(models) {
  known = models;
  if (dialog.open && managed.id) refresh(known.get(managed.id) ?? { ...managed, state: "gone" });
}

function refresh(model) {
  managed = model;
  const { id, state, pinned, digest, why } = model;
  $("manage-title").textContent = id ?? "New alias";
  const about = [state, pinned && "pinned", digest?.slice(0, 12)].filter(Boolean).join(", ");
  $("manage-state").textContent = state === "alias" ? "" : about;
  $("manage-why").textContent = why ?? "";
  const served = !["wrong", "unloaded", "gone"].includes(state);
  const may = { load: true, pin: served && !pinned, unpin: served && pinned };
  may.unload = served;
  may.quarantine = served && state !== "quarantined";
  for (const button of $("acts").children) button.disabled = !may[button.dataset.act];
}

const ACTS = {
  load: (name) => order("POST", "v1/load_lora_adapter", { lora_name: name }),
  unload: (name) => order("POST", "v1/unload_lora_adapter", { lora_name: name }),
  pin: (name) => order("POST", `${adapterPath(name)}:pin`),
  unpin: (name) => order("POST", `${adapterPath(name)}:unpin`),
  quarantine: (name) => order("POST", `${adapterPath(name)}:quarantine`),
  save: (name) => order("PUT", aliasPath(name), { targets: targets() }),
  rollback: (name) => order("PUT", aliasPath(name), { rollback: true }),
  delete: (name) => order("DELETE", aliasPath(name)),
};
const SURE = {
  unload: "Requests for this adapter are rejected until you load it again.",
  quarantine: "Requests for this adapter are rejected until you load it again.",
  delete: "Requests for this alias are rejected from now on.",
};

const adapterPath = (name) => `admin/adapters/${encodeURIComponent(name)}`;

const aliasPath = (name) => `admin/aliases/${encodeURIComponent(name)}`;

async function act(button) {
  const { act } = button.dataset;
  const name = managed.id ?? $("alias-name").value.trim();
  if (SURE[act] && !confirm(`${button.textContent.trim()} ${name}? ${SURE[act]}`)) return;
  dialog.ariaBusy = "true";
  tell("");
  try {
    await ACTS[act](name);
    if (["save", "rollback", "delete"].includes(act)) dialog.close();
    else tell(`Done: ${act}.`);
  } catch (error) {
    const refused = error instanceof Refusal;
    tell(refused ? error.message : `The server did not answer: ${error.message}`, true);
  }
  dialog.ariaBusy = "false";
}

function tell(text, failed = false) {
  $("manage-done").textContent = failed ? "" : text;
  $("manage-wrong").textContent = failed ? text : "";
}

function addTarget({ adapter, digest, weight }) {
  const made = $("target").content.cloneNode(true).firstElementChild;
  const [name, share] = made.querySelectorAll("input");
  name.value = digest ? `${adapter}@${digest}` : adapter;
  share.value = weight;
  made.querySelector("button").addEventListener("click", () => made.remove());
  $("targets").append(made);
}

function targets() {
  return [...$("targets").children].map((row) => {
    const [name, weight] = [...row.querySelectorAll("input")].map((input) => input.value.trim());
    const [adapter, digest] = name.split("@");
    return { adapter, weight: Number(weight), ...(digest && { digest }) };
  });
}

for (const button of dialog.querySelectorAll("[data-act]")) {
  if (button.type === "button") button.addEventListener("click", () => act(button));
}
$("alias").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter);
});
$("more-targets").addEventListener("click", () => {
  addTarget({ adapter: "", weight: 1 });
  $("targets").lastElementChild.querySelector("input").focus();
});
$("manage-close").addEventListener("click", () => dialog.close());
$("new-alias").addEventListener("click", () => manage({ state: "alias" }));
