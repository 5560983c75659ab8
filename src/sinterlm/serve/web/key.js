// The API key: asked for when the server wants one, kept for this tab alone.

import { byId } from "./dom.js";

const SLOT = "sinterlm-api-key";
let asking = null;

/** The key of this tab, or null. */
export function currentKey() {
  return sessionStorage.getItem(SLOT);
}

/**
 * Resolves to true when there is a key other than `rejected` to try, to false when none was given.
 * Several callers that are refused at once share one dialog.
 */
export function askForKey(rejected) {
  if (currentKey() !== rejected) return Promise.resolve(true);
  asking ??= openDialog(rejected !== null).finally(() => {
    asking = null;
  });
  return asking;
}

function openDialog(wasRejected) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-reason").textContent = wasRejected
    ? "The server does not accept this key."
    : "This server asks for a key. It is kept for this tab alone.";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const submit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(SLOT, input.value);
      dialog.close("given");
    };
    const cancel = () => dialog.close("");
    const close = () => {
      byId("key-form").removeEventListener("submit", submit);
      byId("key-cancel").removeEventListener("click", cancel);
      input.value = "";
      resolve(dialog.returnValue === "given");
    };
    byId("key-form").addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", cancel);
    dialog.addEventListener("close", close, { once: true });
  });
}
