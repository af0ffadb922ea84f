// The page: what is served, once a second while it is seen, and the key where one is needed.

import { key, models, unready } from "./api.js";
import { offer } from "./chat.js";
import { show } from "./table.js";

const EACH = 1000; // milliseconds
const $ = (id) => document.getElementById(id);
let locked = false;

async function refresh() {
  if (locked || document.visibilityState !== "visible") return;
  let listed, why;
  try {
    [listed, why] = await Promise.all([models(), unready()]);
  } catch (error) {
    if (error.status === 401) lock();
    else if (error.status) write("trouble", `The server refuses: ${error.message}`);
    else write("trouble", "The server does not answer. This page keeps trying.");
    return;
  }
  unlock();
  offer(listed);
  show(listed);
  const adapters = listed.filter((model) => model.digest).length;
  write("served", `${listed[0].id}, ${adapters} ${adapters === 1 ? "adapter" : "adapters"}`);
  write("trouble", why && `The server is not ready: ${why}. This page keeps trying.`);
}

function unlock() {
  $("door").hidden = true;
  $("parts").hidden = $("chat").hidden = $("adapters").hidden = false;
  $("forget").hidden = !key.get();
}

function lock() {
  locked = true;
  write("key-wrong", key.get() && "The server does not know this key.");
  write("trouble", "");
  key.forget();
  $("parts").hidden = $("chat").hidden = $("adapters").hidden = $("forget").hidden = true;
  $("door").hidden = false;
  $("key").focus();
}

// written only if new: a status that is written is spoken
function write(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.keep($("key").value.trim());
  $("key").value = "";
  locked = false;
  refresh();
});

$("forget").addEventListener("click", () => {
  key.forget();
  location.reload(); // nothing that was said or seen stays
});

document.addEventListener("visibilitychange", refresh);

for (;;) {
  await refresh();
  await new Promise((wake) => setTimeout(wake, EACH));
}
