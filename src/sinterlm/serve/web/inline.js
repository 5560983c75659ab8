// Markdown within a line: code, emphasis, links. Linear in the text; nothing becomes HTML.
//
// A delimiter opens a frame; its partner closes it; what never closes stays the text it was.

import { h } from "./dom.js";

const TOKEN = new RegExp(
  [
    /\\(?<escaped>[\\`*_~[\](){}#+.!|<>-])/,
    /(?<ticks>`+)/,
    /!?\[(?<label>[^[\]\n]{0,500})\]\((?<target>[^\s()<>]{1,2000})\)/,
    /(?<bare>\bhttps?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,;:!?*_])/,
    /(?<delimiter>\*\*|__|~~|\*|_)/,
    /(?<newline> *\n)/,
  ].map((part) => part.source).join("|"),
  "gu",
);
const ELEMENTS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const MAX_DEPTH = 16;

/** The nodes of one run of text. Links lead to http, https and mailto alone. */
export function inline(text) {
  const frames = [{ delimiter: "", nodes: [] }];
  const add = (node) => frames.at(-1).nodes.push(node);
  const unclosedTicks = new Set();
  TOKEN.lastIndex = 0;
  let position = 0;
  for (let match; (match = TOKEN.exec(text)) !== null; position = TOKEN.lastIndex) {
    if (match.index > position) add(text.slice(position, match.index));
    const { escaped, ticks, label, target, bare, delimiter, newline } = match.groups;
    if (escaped !== undefined) add(escaped);
    else if (ticks !== undefined) addCode(text, ticks, unclosedTicks, add);
    else if (target !== undefined) add(link(target, label) ?? match[0]);
    else if (bare !== undefined) add(link(bare, bare) ?? bare);
    else if (newline !== undefined) add(newline.startsWith("  ") ? h("br") : "\n");
    else openOrClose(frames, delimiter, text[match.index - 1], text[TOKEN.lastIndex]);
  }
  add(text.slice(position));
  while (frames.length > 1) flatten(frames);
  return frames[0].nodes;
}

function addCode(text, ticks, unclosed, add) {
  const start = TOKEN.lastIndex;
  const end = unclosed.has(ticks) ? -1 : closingTicks(text, ticks, start);
  if (end < 0) {
    unclosed.add(ticks);
    add(ticks);
    return;
  }
  const code = text.slice(start, end).replace(/\n/g, " ");
  add(h("code", {}, /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code));
  TOKEN.lastIndex = end + ticks.length;
}

function closingTicks(text, ticks, start) {
  for (let at = text.indexOf(ticks, start); at >= 0; at = text.indexOf(ticks, at)) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === ticks.length) return at;
    at = end;
  }
  return -1;
}

function openOrClose(frames, delimiter, before, after) {
  const isSpace = (character) => character === undefined || /\s/u.test(character);
  const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);
  const underscore = delimiter.startsWith("_");
  const canClose = !isSpace(before) && !(underscore && isWord(after));
  const canOpen = !isSpace(after) && !(underscore && isWord(before));
  const opener = frames.findLastIndex((frame) => frame.delimiter === delimiter);
  if (canClose && opener > 0) {
    while (frames.length - 1 > opener) flatten(frames);
    const { nodes } = frames.pop();
    frames.at(-1).nodes.push(h(ELEMENTS[delimiter], {}, ...nodes));
  } else if (canOpen && frames.length < MAX_DEPTH) {
    frames.push({ delimiter, nodes: [] });
  } else {
    frames.at(-1).nodes.push(delimiter);
  }
}

function flatten(frames) {
  const { delimiter, nodes } = frames.pop();
  const target = frames.at(-1).nodes;
  target.push(delimiter);
  for (const node of nodes) target.push(node);
}

function link(target, label) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, label);
}
