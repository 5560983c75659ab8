// The sampling parameters of the playground. What is left empty is not sent: the server decides.

import { byId } from "./dom.js";

const SLOT = "sinterlm-parameters";
const INTEGERS = new Set(["max_completion_tokens", "top_k", "seed"]);
const NUMBERS = ["temperature", "top_p", "top_k", "max_completion_tokens", "seed"];

/** The form beside the conversation; remembers its values in this browser. */
export class Parameters {
  constructor() {
    this.form = byId("parameter-form");
    this.problem = byId("parameter-problem");
    this.restore();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("reset", () => setTimeout(() => this.changed()));
  }

  /** Fields for the request body, or null when one is wrong (its problem is shown and focused). */
  read() {
    this.showProblem();
    const wrong = NUMBERS.map((name) => this.form.elements[name]).find((field) => !field.validity.valid);
    if (wrong) {
      wrong.closest(".parameters").classList.add("open");
      wrong.focus();
      return null;
    }
    const body = {};
    for (const name of NUMBERS) {
      const text = this.form.elements[name].value.trim();
      if (text === "") continue;
      body[name] = INTEGERS.has(name) ? Number.parseInt(text, 10) : Number(text);
    }
    return body;
  }

  /** The system prompt, empty for none. */
  get system() {
    return this.form.elements.system.value.trim();
  }

  changed() {
    this.showProblem();
    const values = Object.fromEntries(new FormData(this.form));
    localStorage.setItem(SLOT, JSON.stringify(values));
  }

  restore() {
    let values = {};
    try {
      values = JSON.parse(localStorage.getItem(SLOT) ?? "{}");
    } catch {
      localStorage.removeItem(SLOT);
    }
    for (const [name, value] of Object.entries(values)) {
      const field = this.form.elements[name];
      if (field) field.value = value;
    }
  }

  showProblem() {
    let text = "";
    for (const name of NUMBERS) {
      const field = this.form.elements[name];
      const isValid = field.validity.valid;
      field.setAttribute("aria-invalid", String(!isValid));
      if (isValid || text !== "") continue;
      text = `${this.form.querySelector(`label[for=${name}]`).textContent}: ${field.validationMessage}`;
    }
    if (this.problem.textContent !== text) this.problem.textContent = text;
  }
}
