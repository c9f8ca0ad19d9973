"use strict";
// Texts of models and rows, and figures, as they are shown: in text nodes alone, and with a name
// for each character that is not seen.

// What is not seen, or changes how the rest is seen: controls but tab and line feed; what turns the
// direction of writing, or has no width; tags; halves of characters.
const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\ud800-\\udfff\\u{e0000}-\\u{e007f}]",
  "gu",
);

/** A text as nodes, in which each character that is not seen is named. */
function visible(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(UNSEEN)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(element("span", { class: "unseen" }, `U+${code}`));
    end = found.index + found[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** Nodes in which line ends are elements, so that their colour is seen. */
function withLineEnds(nodes) {
  return nodes.flatMap((node) => {
    if (typeof node !== "string" || !node.includes("\n")) return [node];
    const parts = node.split(/(\n)/);
    const end = { class: "end-of-line" };
    return parts.map((each) => (each === "\n" ? element("span", end, each) : each));
  });
}

/** A text in which such characters are named, where only text can stand. */
function named(text) {
  return visible(text)
    .map((node) => (typeof node === "string" ? node : `[${node.textContent}]`))
    .join("");
}

/** A number in three digits. */
function figure(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size < 0.0005) return "0";
  const text = size >= 1000 ? size.toFixed(0) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "\u2212" : "") + text;
}

/** A difference. */
function signed(value) {
  const text = figure(value);
  return (value > 0 && text !== "0" ? "+" : "") + text;
}

/** Lower case of the same length, so that places in it are those in the text. */
function folded(text) {
  const low = text.toLowerCase();
  if (low.length === text.length) return low;
  return Array.from(text, (each) => {
    const own = each.toLowerCase();
    return own.length === each.length ? own : each;
  }).join("");
}

/** Mark what is searched for, also where it goes over the ends of tokens. */
function mark(list, find) {
  if (!window.CSS?.highlights) return;
  CSS.highlights.delete("found");
  if (!find) return;
  const ranges = [];
  for (const text of list.querySelectorAll(".text")) {
    const nodes = [];
    const walk = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    let whole = "";
    while (walk.nextNode()) {
      nodes.push([whole.length, walk.currentNode]);
      whole += walk.currentNode.data;
    }
    whole = folded(whole);
    let last = 0;
    const place = (at) => {
      while (last + 1 < nodes.length && nodes[last + 1][0] <= at) last += 1;
      return [nodes[last][1], at - nodes[last][0]];
    };
    for (let at = whole.indexOf(find); at >= 0; at = whole.indexOf(find, at + find.length)) {
      const range = new Range();
      range.setStart(...place(at));
      const [node, end] = place(at + find.length - 1);
      range.setEnd(node, end + 1);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

/** A text in a box of its own. */
function plain(text) {
  if (text === "") return element("div", { class: "text empty" }, "empty");
  return element("div", { class: "text", dir: "auto" }, ...visible(text));
}
