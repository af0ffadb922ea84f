// One question to two models at once. Each side sends its own answers back as its conversation.

import { Refusal, chunks } from "./api.js";

const $ = (id) => document.getElementById(id);
const sides = ["left", "right"].map((name) => ({ name, select: $(name), history: [] }));
let running = null; // what stops the answers that are being written

/** Let the user choose among these models. What is chosen stays, listed or not. */
export function offer(models) {
  const wanted = new URLSearchParams(location.search);
  const first = models.find((model) => model.digest) ?? models[0];
  const groups = Map.groupBy(models, kindOf);
  for (const { name, select } of sides) {
    const chosen = select.value || wanted.get(name) || (name === "left" ? models[0] : first).id;
    const unlisted = models.some((model) => model.id === chosen) ? [] : [{ id: chosen }];
    const offered = unlisted.length ? new Map([["Not listed", unlisted], ...groups]) : groups;
    const made = JSON.stringify([...offered].map(([kind, list]) => [kind, list.map((m) => m.id)]));
    if (select.dataset.made === made) continue; // an open list stays as it is
    select.dataset.made = made;
    select.replaceChildren(...[...offered].map(([kind, list]) => group(kind, list)));
    select.value = chosen;
  }
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
  if (running === stopping) setRunning(null);
}

async function converse(side, answer, question, signal) {
  const { history } = side; // a new conversation has another one
  const system = $("system").value.trim();
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...history,
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

/** One model's answer to one question, on the page. */
class Answer {
  constructor(model) {
    this.model = model;
    this.element = $("answer").content.cloneNode(true).firstElementChild;
    this.element.querySelector("h3").textContent = model;
    this.said = this.part(".said");
    this.thought = this.part(".reasoning .text");
    this.tokens = 0;
  }

  part(selector) {
    return this.element.querySelector(selector).appendChild(new Text());
  }

  get text() {
    return this.said.data;
  }

  /** Ask, and write down what comes until it is complete, has failed, or is stopped. */
  async read(asked, signal) {
    this.asked = performance.now();
    try {
      for await (const chunk of chunks(asked, signal)) this.take(chunk);
    } catch (error) {
      if (signal.aborted) this.finish = "stopped";
      else this.error = toldBy(error);
    }
    following(() => {
      this.element.ariaBusy = "false";
      this.show(".numbers", this.numbers.join(" · "));
      this.show(".error", this.error ?? "");
    });
  }

  take({ choices: [choice], usage }) {
    this.tokens = usage?.completion_tokens ?? this.tokens;
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (content || reasoning) {
      this.last = performance.now();
      this.first ??= this.last;
      this.tokens += 1; // until the usage says it
      this.write(content, reasoning);
    }
    this.finish = choice.finish_reason ?? this.finish;
  }

  write(content, reasoning) {
    following(() => {
      if (reasoning) this.element.querySelector(".reasoning").hidden = false;
      this.thought.appendData(reasoning ?? "");
      this.said.appendData(content ?? "");
      this.show(".numbers", "");
    });
  }

  show(selector, text) {
    this.element.querySelector(selector).textContent = text;
  }

  get numbers() {
    const found = [];
    const seconds = (this.last - this.first) / 1000;
    if (this.tokens || !this.error) found.push(counted(this.tokens));
    if (this.tokens > 1 && seconds > 0) {
      found.push(`${((this.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (this.first) found.push(`first token after ${duration(this.first - this.asked)}`);
    if (this.finish && this.finish !== "stop") found.push(ENDS[this.finish] ?? this.finish);
    return found;
  }

  /** What a screen reader says once the answer has ended. */
  get summary() {
    if (this.error) return `${this.model} failed: ${this.error}`;
    const done = this.finish === "stopped" ? "was stopped" : "has answered";
    return `${this.model} ${done}: ${counted(this.tokens)}`;
  }
}

/** Change the conversation; who reads its end goes on seeing its end. */
function following(change) {
  const box = $("conversation");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  change();
  if (follows) box.scrollTop = box.scrollHeight;
}

function toldBy(error) {
  if (!(error instanceof Refusal)) return `The connection to the server was lost: ${error.message}`;
  return error.code ? `${error.message} (${error.code})` : error.message;
}

const ENDS = { length: "cut off (length)" };

const counted = (tokens) => `${tokens} ${tokens === 1 ? "token" : "tokens"}`;

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

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

// what is invalid has to be seen
$("options").addEventListener("invalid", () => ($("options").open = true), true);

$("stop").addEventListener("click", stop);

$("renew").addEventListener("click", () => {
  stop();
  setRunning(null);
  for (const side of sides) side.history = [];
  $("turns").replaceChildren();
});
