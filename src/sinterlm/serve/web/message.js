// One message of the conversation on the page: a question that can be edited, an answer that grows.

import { copyFrom, h, perFrame } from "./dom.js";
import { number, seconds } from "./format.js";
import { MarkdownView } from "./markdown.js";

function action(label, run) {
  return h("button", { type: "button", class: "quiet small", onclick: run }, label);
}

/** What a person asked. `onEdit(text)` is called with a new wording. */
export class Question {
  constructor(text, onEdit) {
    this.text = text;
    this.onEdit = onEdit;
    this.element = h("li", { class: "message question" });
    this.show();
  }

  show(shouldFocus = false) {
    const edit = action("Edit", () => this.edit());
    const copy = action("Copy", () => copyFrom(copy, this.text));
    this.element.replaceChildren(
      h("h2", { class: "hidden" }, "You"),
      h("div", { class: "line" }, h("div", { class: "bubble" }, this.text), h("div", { class: "actions" }, copy, edit)),
    );
    if (shouldFocus) edit.focus();
  }

  edit() {
    const field = h("textarea", { "aria-label": "Edit message", rows: "3" });
    field.value = this.text;
    const save = () => {
      if (field.value.trim() !== "") this.onEdit(field.value.trim());
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault(); // it cancels the edit, not a running answer
        this.show(true);
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    this.element.replaceChildren(
      h("div", { class: "editor" }, field),
      h(
        "div",
        { class: "actions open" },
        action("Cancel", () => this.show(true)),
        h("button", { type: "button", class: "primary small", onclick: save }, "Send again"),
      ),
    );
    field.focus();
  }
}

/** What the model answers, drawn as it comes; `onRegenerate()` asks for another. */
export class Answer {
  constructor(onRegenerate) {
    this.onRegenerate = onRegenerate;
    this.content = "";
    this.reasoning = "";
    this.body = h("div", { class: "markdown" });
    this.view = new MarkdownView(this.body);
    this.foot = h("div", { class: "foot" }, h("span", { class: "pulse" }, "Waiting for the first token"));
    this.element = h(
      "li",
      { class: "message answer", "aria-busy": "true" },
      h("h2", { class: "hidden" }, "Answer"),
      this.body,
      this.foot,
    );
    this.draw = perFrame(() => this.drawNow());
  }

  /** Adds what one event brought; either text may be empty. */
  push(reasoning, content) {
    this.reasoning += reasoning;
    this.content += content;
    this.draw();
  }

  drawNow() {
    if (this.reasoning !== "" && this.thoughts === undefined) this.openThoughts();
    if (this.thoughts !== undefined) {
      this.thoughtsView.update(this.reasoning);
      const isThinking = this.content === "" && this.timing?.reason === undefined;
      this.summary.textContent = isThinking ? "Thinking…" : "Reasoning";
      this.summary.classList.toggle("pulse", isThinking);
    }
    this.view.update(this.content);
    if (this.timing !== undefined) this.drawFoot();
  }

  openThoughts() {
    this.summary = h("summary", {}, "Thinking…");
    const inner = h("div", { class: "markdown" });
    this.thoughtsView = new MarkdownView(inner);
    this.thoughts = h("details", { class: "reasoning" }, this.summary, inner);
    this.body.before(this.thoughts);
  }

  /** Shows how the answer comes along: {ttft, tokens, rate, reason} with seconds and tokens/s. */
  report(timing) {
    this.timing = timing;
    this.draw();
  }

  drawFoot() {
    const { tokens, rate, ttft, reason } = this.timing;
    const facts = [
      `${number(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
      `${number(rate)} tokens/s`,
      `first token ${seconds(ttft)}`,
    ];
    if (reason === "length") facts.push("cut at the token limit");
    if (reason === "stopped") facts.push("stopped");
    const meta = h("span", { class: "meta" }, facts.join(" · "));
    const actions = reason === undefined ? [] : [this.actions()];
    this.foot.replaceChildren(meta, ...actions);
  }

  actions() {
    const copy = action("Copy", () => copyFrom(copy, this.content));
    return h("div", { class: "actions" }, copy, action("Regenerate", this.onRegenerate));
  }

  /** No more will come; `timing` is null when nothing came at all. */
  finish(timing) {
    this.element.removeAttribute("aria-busy");
    if (timing !== null) this.report(timing);
    else this.foot.replaceChildren(h("span", { class: "meta" }, "stopped"), this.actions());
  }

  /** Shows what went wrong below what had come. */
  fail(title, detail) {
    this.element.removeAttribute("aria-busy");
    if (this.timing === undefined) this.foot.remove();
    this.element.append(
      h(
        "div",
        { class: "failure", role: "alert" },
        h("p", {}, h("strong", {}, title), h("span", {}, detail)),
        action("Try again", this.onRegenerate),
      ),
    );
  }
}
