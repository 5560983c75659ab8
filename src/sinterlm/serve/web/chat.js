// The playground: a conversation with the model, streamed from /v1/chat/completions.

import { Announcer } from "./announcer.js";
import { ApiError, events, request } from "./api.js";
import { byId, h } from "./dom.js";
import { Answer, Question } from "./message.js";
import { Parameters } from "./parameters.js";

const SUGGESTIONS = [
  "What is the capital of France?",
  "Explain gravity in three short sentences.",
  "List five things to pack for a day in the mountains.",
];

/** Owns the conversation: turns of a question and its answer, the composer, the stop button. */
export class Chat {
  constructor(meetModel) {
    this.meetModel = meetModel; // resolves to the name of the model that answers
    this.turns = []; // {question, answer}
    this.running = null; // AbortController of the answer that streams
    this.parameters = new Parameters();
    this.announcer = new Announcer();
    this.prompt = byId("prompt");
    this.scroller = byId("scroll");
    this.follows = true; // the view stays at the end while the reader is there
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", (event) => {
      const isFree = !event.defaultPrevented && document.querySelector("dialog[open]") === null;
      if (event.key === "Escape" && isFree) this.stop();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    this.scroller.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.scroller;
      this.follows = scrollHeight - scrollTop - clientHeight < 48;
    });
    new ResizeObserver(() => {
      if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    }).observe(byId("messages"));
    byId("suggestions").append(...SUGGESTIONS.map((text) => this.suggestion(text)));
    this.showState();
  }

  suggestion(text) {
    const button = h("button", { type: "button" }, text);
    button.addEventListener("click", () => this.ask(text));
    return h("li", {}, button);
  }

  send() {
    const text = this.prompt.value.trim();
    if (text === "" || this.running !== null) return;
    if (this.ask(text)) this.prompt.value = "";
  }

  /** Asks `text` after the turns so far; false when a parameter is wrong. */
  ask(text) {
    const body = this.running === null ? this.parameters.read() : null;
    if (body === null) return false;
    const turn = {};
    turn.question = new Question(text, (edited) => this.askAgain(turn, edited));
    this.turns.push(turn);
    byId("messages").append(turn.question.element);
    this.answer(turn, body);
    return true;
  }

  /** Takes the conversation back to `turn` and asks it again, perhaps in other words. */
  async askAgain(turn, text) {
    const body = this.parameters.read();
    if (body === null) return;
    await this.stop();
    const later = this.turns.splice(this.turns.indexOf(turn) + 1);
    for (const { question, answer } of later) {
      question.element.remove();
      answer.element.remove();
    }
    turn.answer.element.remove();
    turn.question.text = text;
    turn.question.show();
    this.prompt.focus();
    this.answer(turn, body);
  }

  /** Streams the answer of the last turn and resolves when it has ended, however it ended. */
  answer(turn, body) {
    turn.answer = new Answer(() => this.askAgain(turn, turn.question.text));
    byId("messages").append(turn.answer.element);
    this.follows = true;
    this.running = new AbortController();
    this.showState();
    this.done = this.stream(turn.answer, body, this.running.signal).finally(() => {
      this.running = null;
      this.showState();
    });
    return this.done;
  }

  async stream(answer, body, signal) {
    const clock = new Clock();
    this.announcer.start();
    try {
      const whole = { model: await this.meetModel(), ...this.history(), ...body };
      const response = await request("v1/chat/completions", { body: whole, signal });
      for await (const event of events(response)) {
        const [choice] = event.choices;
        if (event.usage) clock.tokens = event.usage.completion_tokens;
        if (choice === undefined) continue;
        const { delta } = choice;
        const content = delta.content ?? "";
        clock.tick(choice.finish_reason);
        answer.push(delta.reasoning ?? delta.reasoning_content ?? "", content);
        answer.report(clock.live());
        this.announcer.push(content);
      }
      answer.finish(clock.final("stop"));
      this.announcer.finish("Answer complete.");
    } catch (error) {
      this.end(answer, clock, error, signal);
    }
  }

  end(answer, clock, error, signal) {
    if (clock.first !== null || signal.aborted) answer.finish(clock.final("stopped"));
    if (signal.aborted) {
      this.announcer.finish("Stopped.");
    } else {
      answer.fail(...wordsOf(error));
      this.announcer.finish("");
    }
  }

  /** The turns so far as the request's messages. */
  history() {
    const system = this.parameters.system;
    const messages = system === "" ? [] : [{ role: "system", content: system }];
    for (const { question, answer } of this.turns) {
      messages.push({ role: "user", content: question.text });
      if (answer.content !== "") messages.push({ role: "assistant", content: answer.content });
    }
    return { messages, stream: true, stream_options: { include_usage: true } };
  }

  /** Ends the running answer, if any; what has come stays. */
  async stop() {
    if (this.running === null) return;
    this.running.abort();
    await this.done;
  }

  async clear() {
    await this.stop();
    this.turns = [];
    byId("messages").replaceChildren();
    this.showState();
    this.prompt.focus();
  }

  showState() {
    const isRunning = this.running !== null;
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    if (hadFocus) byId(isRunning ? "stop" : "send").focus();
    byId("clear").hidden = this.turns.length === 0;
    byId("welcome").hidden = this.turns.length > 0;
  }
}

/** When tokens came, by this browser's clock. */
class Clock {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0; // events so far, then the server's own count
    this.reason = null;
  }

  tick(reason) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
    this.reason = reason ?? this.reason;
  }

  live() {
    const span = (this.last - this.first) / 1e3;
    return {
      tokens: this.tokens,
      ttft: (this.first - this.start) / 1e3,
      rate: this.tokens > 1 && span > 0 ? (this.tokens - 1) / span : null,
    };
  }

  final(otherwise) {
    return this.first === null ? null : { ...this.live(), reason: this.reason ?? otherwise };
  }
}

/** A title and a sentence for whatever went wrong. */
function wordsOf(error) {
  if (!(error instanceof ApiError)) return ["The server cannot be reached. ", String(error.message)];
  if (error.status === 401) return ["A key is needed. ", error.message];
  if (error.status === 429) {
    const wait = error.retryAfter === null ? "" : ` (Room is expected in ${error.retryAfter} s.)`;
    return ["The server is full. ", `${error.message}${wait}`];
  }
  if (error.status >= 400 && error.status < 500) {
    return [error.param ? `The server refuses ${error.param}. ` : "The server refuses. ", error.message];
  }
  return ["The answer failed. ", error.message];
}
