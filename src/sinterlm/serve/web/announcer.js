// What a screen reader hears of a streamed answer: whole sentences as they are complete.

import { byId, h } from "./dom.js";

const SENTENCE = /^[\s\S]*?[.!?…:](?=\s)|^[\s\S]*?\n/u;

/** Feeds the page's live region. */
export class Announcer {
  constructor() {
    this.region = byId("announcer");
    this.pending = "";
  }

  /** A new answer begins. */
  start() {
    this.region.replaceChildren();
    this.pending = "";
    this.say("Generating.");
  }

  /** More of the answer; spoken once a sentence is whole. */
  push(text) {
    this.pending += text;
    for (let match; (match = SENTENCE.exec(this.pending)) !== null; ) {
      this.say(match[0]);
      this.pending = this.pending.slice(match[0].length);
    }
  }

  /** The answer has ended; `words` says how. */
  finish(words) {
    this.say(this.pending);
    this.pending = "";
    this.say(words);
  }

  say(text) {
    if (text.trim() !== "") this.region.append(h("p", {}, text.trim()));
  }
}
