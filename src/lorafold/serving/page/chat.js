// Sends one question to two models and compares the answers. Each side's conversation contains only
// its own answers.

import { Answer, following } from "./answer.js";
import { compared } from "./difference.js";

const $ = (id) => document.getElementById(id);
const sides = ["left", "right"].map((name) => ({ name, select: $(name), history: [] }));
let running = null; // the AbortController of the current answers
let single = new Set(); // ids of adapters that were trained on single questions

/** Let the user choose among these models. What is chosen stays, listed or not. */
export function offer(models) {
  const wanted = new URLSearchParams(location.search);
  const base = models.find((model) => model.parent === null) ?? models[0];
  const first = models.find((model) => model.digest) ?? base;
  const groups = Map.groupBy(models, kindOf);
  single = new Set(models.filter((model) => model.single_turn).map(({ id }) => id));
  for (const { name, select } of sides) {
    const chosen = select.value || wanted.get(name) || (name === "left" ? base : first).id;
    const unlisted = models.some((model) => model.id === chosen) ? [] : [{ id: chosen }];
    const offered = unlisted.length ? new Map([["Not listed", unlisted], ...groups]) : groups;
    select.replaceChildren(...[...offered].map(([kind, list]) => group(kind, list)));
    select.value = chosen;
  }
}

/** Ask this model on the right from now on. */
export function choose(id) {
  sides[1].select.value = id;
  showChoiceInAddress();
  $("question").focus();
}

function kindOf(model) {
  if (model.parent === null) return "Base";
  return model.state === "alias" ? "Aliases" : "Adapters";
}

function group(label, models) {
  const made = document.createElement("optgroup");
  made.label = label;
  made.append(...models.map(({ id }) => new Option(id, id)));
  return made;
}

function showChoiceInAddress() {
  const query = new URLSearchParams(sides.map(({ name, select }) => [name, select.value]));
  history.replaceState(null, "", `?${query}${location.hash}`);
}

async function ask(question) {
  const turn = $("turn").content.cloneNode(true).firstElementChild;
  const answers = sides.map((side) => new Answer(side.select.value));
  turn.querySelector(".question .text").textContent = question;
  turn.querySelector(".answers").append(...answers.map((answer) => answer.element));
  $("turns").append(turn);
  $("conversation").scrollTop = $("conversation").scrollHeight;

  const stopping = new AbortController();
  setRunning(stopping);
  await Promise.all(sides.map((side, i) => converse(side, answers[i], question, stopping.signal)));
  if (answers.every((answer) => answer.complete)) {
    following(() => turn.append(compared(...answers.map((answer) => answer.text))));
  }
  if (running === stopping) setRunning(null);
}

async function converse(side, answer, question, signal) {
  const { history } = side; // a new conversation replaces it
  answer.afresh = history.length > 0 && single.has(answer.model) && !$("continue").checked;
  const system = $("system").value.trim();
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...(answer.afresh ? [] : history),
    { role: "user", content: question },
  ];
  const asked = {
    model: answer.model,
    messages,
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("length").valueAsNumber,
  };
  await answer.read(asked, signal);
  if (answer.text) {
    history.push(messages.at(-1), { role: "assistant", content: answer.text });
  }
  if (side.history === history) $("said").append(paragraph(answer.summary));
}

function paragraph(text) {
  const made = document.createElement("p");
  made.textContent = text;
  return made;
}

function setRunning(stopping) {
  running = stopping;
  $("send").disabled = Boolean(running);
  $("stop").disabled = !running;
  if (running) $("said").replaceChildren();
}

function stop() {
  running?.abort();
  $("question").focus();
}

for (const { select } of sides) select.addEventListener("change", showChoiceInAddress);

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value;
  if (running || !question.trim()) return;
  $("question").value = "";
  $("question").focus();
  ask(question);
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

// opens the options, so that an invalid field is visible
$("options").addEventListener("invalid", () => ($("options").open = true), true);

$("stop").addEventListener("click", stop);

$("markdown").addEventListener("change", () => {
  $("turns").classList.toggle("plain", !$("markdown").checked);
});

$("renew").addEventListener("click", () => {
  stop();
  setRunning(null);
  for (const side of sides) side.history = [];
  $("turns").replaceChildren();
});
