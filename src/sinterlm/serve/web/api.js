// The server's API as this page uses it: one fetch with the key, errors with their words, SSE.

import { askForKey, currentKey } from "./key.js";

/** What the server refused or could not do, in its own words. */
export class ApiError extends Error {
  constructor(status, message, { param = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

/** Fetches `path` relative to the page; asks for the key until the server takes it. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const key = currentKey();
    const headers = { Accept: "application/json" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    if (!(await askForKey(key))) throw await errorOf(response);
  }
}

async function errorOf(response) {
  const retryAfter = response.headers.get("Retry-After");
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    if (typeof error.message === "string") {
      return new ApiError(response.status, error.message, { param: error.param, retryAfter });
    }
  } catch {
    // Not our server's error, perhaps a proxy's: its status says more than its HTML.
  }
  const words = `The server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, words, { retryAfter });
}

/**
 * The JSON events of a streamed response, until `[DONE]`.
 * An error event is thrown; so is a stream that ends before it is done.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError(0, "The connection ended before the answer did.");
      const lines = (pending + value).split(/\r?\n/);
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) {
          const { message, code, param } = event.error;
          throw new ApiError(Number(code) || 500, message, { param });
        }
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
