// One model's answer to one question: its raw text, its formatted text and its statistics.

import { Refusal, chunks } from "./api.js";
import { Formatted } from "./markdown.js";

const $ = (id) => document.getElementById(id);

/** An answer that comes, and what a screen reader says of it. */
export class Answer {
  constructor(model) {
    this.model = model;
    this.element = $("answer").content.cloneNode(true).firstElementChild;
    this.element.querySelector("h3").textContent = model;
    this.said = this.part(".said");
    this.formatted = new Formatted(this.element.querySelector(".formatted"));
    this.thought = this.part(".reasoning .text");
    this.tokens = 0;
  }

  part(selector) {
    return this.element.querySelector(selector).appendChild(new Text());
  }

  get text() {
    return this.said.data;
  }

  get complete() {
    return Boolean(this.text) && !this.error && this.finish !== "stopped";
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
      this.formatted.show(this.text);
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
      this.tokens += 1; // until the usage arrives
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
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      following(() => this.formatted.show(this.text));
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
    if (this.afresh) found.push("asked afresh: trained on single questions");
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
export function following(change) {
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
