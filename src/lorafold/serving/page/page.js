// The page: streams the list of models while the page is visible, and asks for a key if the server
// requires one.

import { checkAdministrator, key, watched } from "./api.js";
import { offer } from "./chat.js";
import { follow } from "./manage.js";
import { show } from "./table.js";

const AGAIN = 1000; // milliseconds before the stream is requested again
const SILENT = 40_000; // milliseconds without data; the server pings every 15 s
const KEEPS = " Retrying.";
const $ = (id) => document.getElementById(id);
const known = new Map();
let names = ""; // names of the models that can be used
let administrator = false;
let locked = false;
let soon = false; // request the stream at once
let wake = () => {}; // ends the current wait
let stopping = new AbortController();

async function listen() {
  const controller = (stopping = new AbortController());
  const { signal } = controller;
  let silence;
  const heard = () => {
    clearTimeout(silence);
    silence = setTimeout(() => controller.abort(SILENT), SILENT);
  };
  heard();
  try {
    for await (const event of watched(signal, heard)) take(event);
    if (!$("trouble").textContent) write("trouble", `The server closed the connection.${KEEPS}`);
  } catch (error) {
    if (signal.aborted && signal.reason !== SILENT) return; // this page stopped the stream
    if (error.status === 401) lock();
    else if (error.status === 503) write("trouble", unready(error.message));
    else if (error.status) write("trouble", `Request rejected: ${error.message}.${KEEPS}`);
    else write("trouble", `The server does not answer.${KEEPS}`);
  } finally {
    clearTimeout(silence);
  }
}

function take(event) {
  const whole = event.object === "list";
  if (whole) {
    known.clear();
    unlock(event.administrator);
  }
  for (const model of event.data) known.set(model.id, model);
  for (const name of event.removed ?? []) known.delete(name);
  if (event.status !== undefined) write("trouble", event.status && unready(event.status));
  const models = [...known.values()];
  name(models);
  show(models, administrator);
  follow(known);
}

const unready = (why) => `The server is not ready: ${why}.${KEEPS}`;

function name(models) {
  const usable = models.filter(({ state }) => state !== "wrong" && state !== "unloaded");
  usable.sort((a, b) => rank(a) - rank(b) || (a.id < b.id ? -1 : 1));
  const now = usable.map((model) => model.id).join(" ");
  $("chat").hidden = !usable.length;
  if (now === names) return;
  names = now;
  if (usable.length) offer(usable);
  const adapters = usable.filter((model) => rank(model) === 1).length;
  const told = `${adapters.toLocaleString("en")} ${adapters === 1 ? "adapter" : "adapters"}`;
  write("served", rank(usable[0] ?? {}) ? told : `${usable[0].id}, ${told}`);
}

const rank = (model) => (model.parent === null ? 0 : model.state === "alias" ? 2 : 1);

function unlock(sees) {
  administrator = sees;
  $("door").hidden = true;
  $("parts").hidden = $("adapters").hidden = false;
  $("forget").hidden = !key.get();
  $("administer").hidden = administrator;
  $("new-alias").hidden = !administrator;
}

function lock() {
  locked = true;
  write("key-wrong", key.get() && "The server does not accept this key.");
  write("trouble", "");
  key.forget();
  for (const id of ["parts", "chat", "adapters", "forget", "administer"]) $(id).hidden = true;
  ask("This server requires an API key", false);
}

function ask(why, forMore) {
  write("door-title", why);
  $("door").hidden = false;
  $("door-shut").hidden = !forMore;
  $("key-form").dataset.administrator = forMore ? "yes" : "";
  $("key").focus();
}

// written only if it changed, because screen readers read each new status aloud
function write(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function again() {
  soon = true;
  stopping.abort();
  wake();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const sent = $("key").value.trim();
  write("key-wrong", "");
  try {
    if ($("key-form").dataset.administrator) await checkAdministrator(sent);
  } catch (error) {
    write("key-wrong", error.message);
    return;
  }
  key.keep(sent);
  $("key").value = "";
  $("door").hidden = true;
  locked = false;
  again();
});

$("administer").addEventListener("click", () => ask("Administrator key", true));

$("door-shut").addEventListener("click", () => {
  $("door").hidden = true;
  $("administer").focus();
});

$("forget").addEventListener("click", () => {
  key.forget();
  location.reload(); // removes all conversations and lists
});

document.addEventListener("visibilitychange", again); // a hidden page has no stream

for (;;) {
  if (document.visibilityState === "visible" && !locked) await listen();
  await new Promise((go) => {
    wake = go;
    setTimeout(go, soon ? 0 : AGAIN);
  });
  soon = false;
}
