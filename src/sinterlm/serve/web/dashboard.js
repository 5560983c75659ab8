// The live dashboard: /ui/stats once a second while it is looked at, drawn as tiles and charts.

import { request } from "./api.js";
import { DistributionChart, LineChart } from "./charts.js";
import { byId, h } from "./dom.js";
import { bytes, number, percent, seconds, UNKNOWN } from "./format.js";
import { History, quantile } from "./history.js";

const PERIOD_MS = 1000;
const TILES = ["Requests running", "Output tokens/s", "TTFT, median", "ITL, median",
  "KV pages in use", "Prefix cache hits"];

/** Polls while shown; `onStatus(state, text)` hears how the server is. */
export class Dashboard {
  constructor(onStatus) {
    this.onStatus = onStatus;
    this.history = new History();
    this.timer = null;
    this.isShown = false;
    this.build();
    document.addEventListener("visibilitychange", () => this.schedule());
    document.querySelectorAll("input[name=span]").forEach((input) =>
      input.addEventListener("change", () => this.draw()),
    );
  }

  /** Starts or stops looking. */
  show(isShown) {
    this.isShown = isShown;
    this.schedule();
  }

  schedule() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.isShown && !document.hidden) this.poll();
  }

  async poll() {
    const turn = (this.turn = {});
    const started = performance.now();
    let isLocked = false;
    try {
      const response = await request("ui/stats");
      this.history.push(started / 1e3, await response.json());
      this.draw();
      this.say("");
    } catch (error) {
      isLocked = error.status === 401;
      this.onStatus("bad", isLocked ? "Key needed" : "Not reached");
      this.say(isLocked ? "A key is needed." : "The server cannot be reached; trying again.", isLocked);
    }
    if (turn !== this.turn || isLocked || !this.isShown || document.hidden) return;
    const wait = Math.max(100, PERIOD_MS - (performance.now() - started));
    this.timer = setTimeout(() => this.poll(), wait);
  }

  say(text, offersRetry = false) {
    const note = byId("dashboard-note");
    if (note.textContent.startsWith(text) && text !== "") return;
    note.replaceChildren(text);
    if (!offersRetry) return;
    const retry = h("button", { type: "button", class: "quiet small" }, "Enter a key");
    retry.addEventListener("click", () => this.schedule());
    note.append(" ", retry);
  }

  build() {
    this.tiles = TILES.map((name) => {
      const value = h("dd", { class: "value" });
      const detail = h("dd", { class: "detail" });
      byId("tiles").append(h("div", { class: "tile" }, h("dt", {}, name), value, detail));
      return { value, detail };
    });
    const whole = (value) => number(value, 0);
    this.charts = {
      requests: new LineChart("Requests", [{ name: "running", tone: "one" }, { name: "waiting", tone: "two" }], whole),
      output: new LineChart("Output tokens per second", [{ name: "tokens/s", tone: "one" }], number),
      ttft: new DistributionChart("Time to first token (TTFT)"),
      itl: new DistributionChart("Inter-token latency (ITL)"),
      pages: new LineChart("KV pages", [{ name: "in use", tone: "one" }, { name: "cached", tone: "two" }], whole),
      prompt: new LineChart("Prompt tokens per second", [{ name: "all", tone: "one" }, { name: "from the prefix cache", tone: "two" }], number),
    };
    byId("charts").append(...Object.values(this.charts).map((chart) => chart.element));
  }

  draw() {
    if (this.history.samples.length === 0) return;
    const { latest } = this.history;
    this.onStatus(...stateOf(latest));
    const span = document.querySelector("input[name=span]:checked").value === "minute" ? 60 : null;
    const ttft = this.history.distribution("ttft", span);
    const itl = this.history.distribution("itl", span);
    const output = this.history.rates((stats) => stats.engine.generation_tokens_total);
    const prompt = this.history.rates((stats) => stats.engine.prompt_tokens_total);
    const hits = this.history.rates((stats) => stats.engine.prefix_cache_hits);
    const gauge = (name) => this.history.series((sample) => sample.stats.engine[name]);
    this.charts.requests.update([gauge("num_running"), gauge("num_waiting")]);
    this.charts.output.update([output]);
    this.charts.ttft.update(ttft);
    this.charts.itl.update(itl);
    this.charts.pages.update([gauge("kv_pages_used"), gauge("kv_pages_cached")], latest.engine.kv_pages_total);
    this.charts.prompt.update([prompt, hits]);
    this.drawTiles(latest.engine, { ttft, itl, output: output.at(-1), prompt: prompt.at(-1) });
    drawOps(latest.engine);
    drawFacts(latest);
  }

  drawTiles(engine, { ttft, itl, output, prompt }) {
    const at = (distribution, q) => seconds(quantile(distribution, q)?.seconds ?? null);
    const part = (a, b) => (b > 0 ? a / b : null);
    const texts = [
      [number(engine.num_running), `${number(engine.num_waiting)} waiting`],
      [number(output), `${number(prompt)} prompt tokens/s`],
      [at(ttft, 0.5), `p99 ${at(ttft, 0.99)}`],
      [at(itl, 0.5), `p99 ${at(itl, 0.99)}`],
      [percent(part(engine.kv_pages_used, engine.kv_pages_total)), `${number(engine.kv_pages_used)} of ${number(engine.kv_pages_total)}`],
      [percent(part(engine.prefix_cache_hits, engine.prefix_cache_queries)), `${number(engine.prefix_cache_hits)} tokens since start`],
    ];
    texts.forEach(([value, detail], index) => {
      this.tiles[index].value.textContent = value;
      this.tiles[index].detail.textContent = detail;
    });
  }
}

function stateOf(stats) {
  if (stats.failure) return ["bad", "Engine failed"];
  return stats.ready ? ["good", "Ready"] : ["busy", "Draining"];
}

function drawOps({ ops, steps, step_seconds_total: stepSeconds }) {
  const rows = ops.map(({ name, calls, seconds: spent, roof_fraction: roof }) => {
    const share = stepSeconds > 0 ? spent / stepSeconds : null;
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, h("code", {}, name)),
      h("td", { class: "number" }, number(calls)),
      h("td", { class: "number" }, steps > 0 ? ((spent / steps) * 1e3).toFixed(3) : UNKNOWN),
      h("td", {}, meter(share, "two")),
      h("td", {}, meter(roof, "one")),
    );
  });
  byId("ops").replaceChildren(...rows);
  const inOps = ops.reduce((sum, op) => sum + op.seconds, 0);
  const hasRoof = ops.some((op) => op.roof_fraction !== null);
  const outside = `${number(steps)} steps, ${percent(1 - inOps / stepSeconds)} of their time outside the ops`;
  byId("ops-note").textContent =
    steps === 0 ? "No step has run yet" : outside + (hasRoof ? "" : "; the roof: --measure-roof");
}

function meter(fraction, tone) {
  const bar = h("span", { class: `meter ${tone}`, "aria-hidden": "true" }, h("span"));
  bar.firstChild.style.width = `${Math.min(Math.max(fraction ?? 0, 0), 1) * 100}%`;
  return h("span", { class: "metered" }, bar, h("span", { class: "number" }, percent(fraction)));
}

function drawFacts({ model, machine, version, uptime_seconds: uptime, engine }) {
  const finished = Object.entries(engine.requests_finished);
  const facts = [
    ["Model", model.name],
    ["Context", `${number(model.max_model_len)} tokens`],
    ["Machine", `${machine.cpu}, ${machine.cpus} CPUs, ${bytes(machine.memory_bytes)}`],
    ["Up for", seconds(uptime)],
    ["Finished", finished.map(([reason, count]) => `${number(count)} ${reason}`).join(", ")],
    ["Preemptions", number(engine.num_preemptions)],
    ["SinterLM", version],
  ];
  if (engine.spec_draft_tokens > 0) {
    const accepted = percent(engine.spec_accepted_tokens / engine.spec_draft_tokens);
    facts.push(["Speculated tokens accepted", accepted]);
  }
  byId("facts").replaceChildren(
    ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}
