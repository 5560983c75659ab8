// Brings the page to life: views by the address's hash, the theme, and which model this is.

import { request } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { byId } from "./dom.js";

const VIEWS = ["chat", "dashboard"];
const THEMES = { system: "light", light: "dark", dark: "system" };

function showStatus(state, text) {
  byId("status").dataset.state = state;
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
}

function showView(dashboard) {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : "chat";
  for (const panel of document.querySelectorAll("[data-view-panel]")) {
    panel.hidden = panel.dataset.viewPanel !== view;
  }
  for (const link of document.querySelectorAll("a[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("skip").href = `#${view}`;
  document.title = view === "chat" ? "Chat · SinterLM" : "Dashboard · SinterLM";
  dashboard.show(view === "dashboard");
}

function setUpTheme() {
  const button = byId("theme");
  const current = () => document.documentElement.dataset.theme ?? "system";
  const name = () => {
    const theme = current();
    byId("theme-name").textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", `Theme: ${theme}. Switch to ${THEMES[theme]}.`);
  };
  button.addEventListener("click", () => {
    const next = THEMES[current()];
    if (next === "system") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("theme", next);
    }
    name();
  });
  name();
}

function setUpComposer() {
  const prompt = byId("prompt");
  const toggle = byId("toggle-parameters");
  toggle.addEventListener("click", () => {
    const isOpen = byId("parameters").classList.toggle("open");
    toggle.setAttribute("aria-expanded", String(isOpen));
  });
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    if (byId("chat").hidden) byId("dashboard").focus();
    else prompt.focus();
  });
}

/** Asks once which model this is; a failure is told to whoever asks, and asked again next time. */
function modelFinder() {
  let known = null;
  return async () => {
    if (known !== null) return known;
    const { data } = await (await request("v1/models")).json();
    known = data[0].id;
    byId("welcome-model").textContent = known;
    showStatus("good", "Ready");
    return known;
  };
}

function start() {
  setUpTheme();
  setUpComposer();
  const meetModel = modelFinder();
  new Chat(meetModel);
  const dashboard = new Dashboard(showStatus);
  window.addEventListener("hashchange", () => showView(dashboard));
  showView(dashboard);
  meetModel().catch((error) => {
    showStatus("bad", error.status === 401 ? "Key needed" : "Not reached");
  });
  if (!byId("chat").hidden) byId("prompt").focus();
}

start();
