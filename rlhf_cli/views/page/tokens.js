"use strict";
// Texts coloured token by token, and what is known of each token.

// By the name in samples.jsonl: what a value is called, what it means above and below 0, its unit.
const VALUES = {
  kls: ["KL", "more likely than under the reference", "less likely", "nats"],
  advantages: ["advantage", "better than expected", "worse", ""],
  rewards: ["reward", "paid", "charged", ""],
  logprobs: ["log-prob", "", "less expected", "nats"],
};

/**
 * The text of an answer, token by token; the last ones may end it without being in it. Values of
 * the size `most` have their whole colour.
 */
function coloured(name, answer, by, most) {
  const label = `${named(name)}, by ${VALUES[by][0]} of tokens; arrows move along them`;
  const attributes = { class: "text coloured", dir: "auto", tabindex: "0", role: "group" };
  const text = element("div", { ...attributes, "aria-label": label });
  let length = 0;
  answer.tokens.forEach((each, i) => {
    if (each === "") return; // a part of the character that a later token ends
    const value = answer[by][i];
    const token = element("span", { class: "token" }, ...withLineEnds(visible(each)));
    if (length >= answer.text.length) token.classList.add("end");
    if (value !== null) {
      token.classList.add(value < 0 ? "below" : "above");
      token.style.setProperty("--share", Math.min(1, Math.abs(value) / most).toFixed(3));
    }
    token.told = () => told(answer, i);
    length += each.length;
    text.append(token);
  });
  if (length < answer.text.length) {
    text.append(element("span", { class: "rest" }, ...visible(answer.text.slice(length))));
  }
  if (!text.hasChildNodes()) return plain("");
  text.addEventListener("keydown", (event) => moveAlong(event, text));
  text.addEventListener("focus", () => {
    if (!text.querySelector(".picked")) pick(text.querySelector(".token"));
  });
  return text;
}

/** What is known of a token, in words. */
function told(answer, i) {
  const known = Object.entries(VALUES)
    .filter(([name]) => answer[name])
    .map(([name, [label]]) => `${label} ${figure(answer[name][i])}`);
  const token = JSON.stringify(named(answer.tokens[i]));
  return `${i + 1} of ${answer.tokens.length}, ${token}: ${known.join(", ")}`;
}

/** Tell of a token, and mark it. */
function pick(token) {
  if (!token) return;
  const text = token.closest(".text");
  text.querySelector(".picked")?.classList.remove("picked");
  token.classList.add("picked");
  text.parentElement.querySelector("output.told").textContent = token.told();
}

/** Go along the tokens of a text by keys. */
function moveAlong(event, text) {
  const tokens = [...text.querySelectorAll(".token")];
  const at = tokens.findIndex((each) => each.classList.contains("picked"));
  const last = tokens.length - 1;
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const next = tokens[Math.max(0, Math.min(last, to))];
  pick(next);
  next?.scrollIntoView({ block: "nearest" });
}

/** A token in one line, in words where nothing of it is seen. */
function quoted(token) {
  if (token === "") return ["(goes on)"]; // a part of the character that a later one ends
  const text = JSON.stringify(token).slice(1, -1);
  return text.trim() ? visible(text) : ["(space)"];
}

/** All values of all tokens, for those who do not see colours; made when it is opened. */
function tokenTable(answer) {
  const details = element("details", {}, element("summary", {}, "values of tokens"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const names = Object.keys(VALUES).filter((name) => answer[name]);
    const heads = ["token", ...names.map((name) => VALUES[name][0])];
    const cells = heads.map((each) => element("th", { scope: "col" }, each));
    const rows = answer.tokens.map((token, i) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, ...quoted(token)),
        ...names.map((name) => element("td", {}, figure(answer[name][i]))),
      ),
    );
    const head = element("thead", {}, element("tr", {}, ...cells));
    details.append(element("table", {}, head, element("tbody", {}, ...rows)));
  });
  return details;
}
