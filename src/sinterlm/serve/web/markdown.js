// Markdown as models write it: paragraphs, headings, lists, quotes, tables, fenced code.
//
// A growing text is drawn cheaply: blocks before the last one are final and never drawn again.
// Output is elements and text nodes; HTML in the source stays text, images stay links.

import { copyFrom, h } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

/** Draws a text that only grows into `root`. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.settled = 0; // characters whose blocks are final
    this.tail = []; // nodes of the block that may still change
  }

  /** Shows `text`, of which everything shown before is a prefix. */
  update(text) {
    const source = text.slice(this.settled);
    const blocks = parseBlocks(source.split("\n"), 0);
    for (const node of this.tail) node.remove();
    this.tail = [];
    blocks.forEach((block, index) => {
      const node = block.draw();
      this.root.append(node);
      if (index === blocks.length - 1) this.tail = [node];
    });
    if (blocks.length > 1) this.settled += offsetOfLine(source, blocks.at(-1).line);
  }
}

function offsetOfLine(source, line) {
  let offset = 0;
  for (let i = 0; i < line; i += 1) offset = source.indexOf("\n", offset) + 1;
  return offset;
}

/** Blocks of `lines`, each with its first line and a `draw` that makes its element. */
function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [end, draw] = parseBlock(lines, at, depth);
    blocks.push({ line: at, draw });
    at = end;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [at + 1, () => h(`h${Math.min(heading[1].length + 2, 6)}`, {}, ...inline(heading[2]))];
  if (RULE.test(line)) return [at + 1, () => h("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) return table(lines, at);
  return paragraph(lines, at);
}

function drawAll(blocks) {
  return blocks.map((block) => block.draw());
}

function code(lines, at, [opening, marks, language]) {
  const indent = opening.search(/\S/);
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const strip = new RegExp(`^ {0,${indent}}`);
  const text = lines.slice(at + 1, end).map((line) => line.replace(strip, "")).join("\n");
  const draw = () => {
    const copy = h("button", { type: "button", class: "quiet small" }, "Copy code");
    copy.addEventListener("click", () => copyFrom(copy, text));
    return h(
      "div",
      { class: "code" },
      h("div", { class: "code-head" }, h("span", {}, language || "code"), copy),
      h("pre", { tabindex: "0" }, h("code", {}, text)),
    );
  };
  return [end + 1, draw];
}

function quote(lines, at, depth) {
  const inner = [];
  let end = at;
  for (let match; end < lines.length && (match = QUOTE.exec(lines[end])); end += 1) {
    inner.push(match[1]);
  }
  return [end, () => h("blockquote", {}, ...drawAll(parseBlocks(inner, depth + 1)))];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || /\d/.test(item[2]) !== isOrdered || RULE.test(lines[end])) break;
    const width = item[1].length + item[2].length + Math.min(Math.max(item[3].length, 1), 4);
    const [next, inner] = itemLines(lines, end, width, item[4]);
    items.push(inner);
    end = next;
  }
  const start = isOrdered ? Number.parseInt(first[2], 10) : 1;
  const draw = () =>
    h(
      isOrdered ? "ol" : "ul",
      { start: isOrdered && start !== 1 ? String(start) : null },
      ...items.map((inner) => drawItem(inner, depth)),
    );
  return [end, draw];
}

/** Lines of one list item without its indent, and where the next block or item begins. */
function itemLines(lines, at, width, firstText) {
  const inner = [firstText];
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const indent = line.search(/\S/);
    if (indent < 0) {
      const next = lines.slice(end).findIndex((l) => l.trim() !== "");
      const continues = next > 0 && belongs(lines[end + next], width);
      if (!continues) break;
    } else if (indent < Math.min(width, 2) && (startsBlock(line) || inner.at(-1) === "")) {
      break;
    } else if (indent < width && ITEM.test(line)) {
      break;
    }
    inner.push(line.slice(Math.min(Math.max(indent, 0), width)));
    end += 1;
  }
  return [skipBlankBeforeItem(lines, end), inner];
}

function belongs(line, width) {
  return line.search(/\S/) >= Math.min(width, 2) && !(line.search(/\S/) < width && ITEM.test(line));
}

function skipBlankBeforeItem(lines, at) {
  let next = at;
  while (next < lines.length && lines[next].trim() === "") next += 1;
  return next < lines.length && ITEM.test(lines[next]) ? next : at;
}

function drawItem(inner, depth) {
  const blocks = parseBlocks(inner, depth + 1);
  const nodes = drawAll(blocks);
  if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes); // tight, as written
  return h("li", {}, ...nodes);
}

function table(lines, at) {
  const cells = (line) =>
    line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const head = cells(lines[at]);
  const row = (line, tag) => {
    const own = cells(line);
    return h("tr", {}, ...head.map((_, column) => h(tag, {}, ...inline(own[column] ?? ""))));
  };
  const draw = () =>
    h(
      "div",
      { class: "table-scroll", tabindex: "0" },
      h(
        "table",
        {},
        h("thead", {}, row(lines[at], "th")),
        h("tbody", {}, ...lines.slice(at + 2, end).map((line) => row(line, "td"))),
      ),
    );
  return [end, draw];
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end])) end += 1;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return [end, () => h("p", {}, ...inline(text))];
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || RULE.test(line);
}
