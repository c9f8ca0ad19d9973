"use strict";
// One task after another: by key, mouse or screen reader. What models wrote is only ever text.

const $ = (id) => document.getElementById(id);
const PAIR = [
  ["1", "much"], ["2", "clearly"], ["3", "somewhat"], ["4", "slightly"],
  ["5", "Tie"], ["6", "Both bad"],
  ["7", "slightly"], ["8", "somewhat"], ["9", "clearly"], ["0", "much"],
];
const KEYS = {
  rank: [
    ["1 to 9", "the next best response"], ["= or Space", "the next pick ties with the last one"],
    ["Backspace", "take the last pick back"], ["Enter", "save, once all are ranked"],
  ],
  pair: [
    ["1 2 3 4", "A is much, clearly, somewhat, slightly better"], ["5", "a tie"],
    ["6", "both are bad"], ["7 8 9 0", "B is slightly, somewhat, clearly, much better"],
  ],
  thumbs: [["y", "good"], ["n", "bad"]],
};
const ALWAYS = [
  ["u", "take the last answer back"], ["s", "skip"], ["f", "flag what should enter no data"],
  ["m", "a note with this answer"], ["j, k", "scroll"], ["?", "this help"],
];

let state = null; // as the server told it last
let groups = []; // of rank: lists of shown numbers, best first
let ties = false; // whether the next pick joins the last group
let note = "";
let busy = false; // a request is under way
let seconds = 0; // that the task was looked at
let since = null; // since when it is, on the page's clock

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function button(text, key, act) {
  const made = element("button", `${text} `, { type: "button", "aria-keyshortcuts": key });
  made.append(element("kbd", key));
  made.addEventListener("click", act);
  return made;
}

// ------------------------------------------------------------------ time that was spent looking

function look(visible) {
  if (since !== null) seconds += (performance.now() - since) / 1000;
  since = visible ? performance.now() : null;
}
document.addEventListener("visibilitychange", () => look(!document.hidden));

// ------------------------------------------------------------------ the server

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json", "x-label": "1" },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  if (response.status === 403) throw new Error("this page is no longer signed in: open your address again");
  const told = await response.json().catch(() => ({ fault: `the server does not take this (${response.status})` }));
  if (told.fault && told.turn === undefined) throw new Error(told.fault);
  return told;
}

async function send(path, body, saying) {
  if (busy) return;
  busy = true;
  try {
    const told = await ask(path, body);
    if (told.finished) return end();
    show(told);
    say(told.fault ? `${told.fault}: here is what is next` : saying(told));
  } catch (error) {
    const lost = error instanceof TypeError;
    say(lost ? "the server does not answer: run the same command again" : error.message);
  } finally {
    busy = false;
  }
}

function answer(line) {
  if (!state || !state.turn) return;
  look(!document.hidden);
  const { task, showing } = state.turn;
  send("/answer", { task, showing, line, note, seconds }, () => "Saved");
}

function say(text) {
  $("message").textContent = text;
}

// ------------------------------------------------------------------ what is shown

function show(told) {
  state = told;
  [groups, ties, note, seconds] = [[], false, "", 0];
  since = document.hidden ? null : performance.now();
  const { turn, done, turns, protocol } = told;
  $("place").textContent = turn ? `Task ${done + 1} of ${turns}` : "Done";
  document.title = `${$("place").textContent} - label`;
  $("progress").max = turns;
  $("progress").value = done;
  $("task").hidden = !turn;
  $("done").hidden = Boolean(turn) && !told.may_finish;
  $("undo").disabled = done === 0;
  $("answers").replaceChildren();
  $("picked").textContent = "";
  $("finish").disabled = !told.may_finish;
  $("done-text").textContent = turn ? "" : told.may_finish
    ? `All ${turns} tasks are labelled. You can still undo.`
    : `All your ${turns} tasks are labelled. Others have ${told.others_left} left; you may close this page.`;
  fillHelp();
  if (!turn) return;
  $("prompt").replaceChildren(...turn.prompt.flatMap(({ role, text }) => [
    ...(role ? [element("p", role, { class: "quiet" })] : []), element("pre", text),
  ]));
  $("responses").className = turn.responses.length === 2 ? "two" : "";
  $("responses").replaceChildren(...turn.responses.map(card));
  if (protocol === "rank") showRank();
  if (protocol === "pair") showPair();
  if (protocol === "thumbs") {
    $("answers").append(button("Good", "y", () => answer("y")), button("Bad", "n", () => answer("n")));
  }
  document.querySelector("main").scrollTop = 0;
}

function nameOf(i) {
  if (state.protocol === "pair") return "AB"[i];
  return state.protocol === "rank" ? String(i + 1) : "";
}

function card(response, i) {
  const made = element("article", "", { "aria-label": `response ${nameOf(i)}` });
  const head = element("header");
  head.append(element("h3", `Response ${nameOf(i)}`), element("span", "", { class: "rank" }));
  if (response.cut) head.append(element("span", "cut at the most tokens", { class: "cut" }));
  if (state.protocol === "rank") {
    head.append(button("Next best", nameOf(i), () => pick(i + 1)));
    const tie = element("button", "Tie with last", { type: "button", class: "tie" });
    tie.addEventListener("click", () => { ties = true; pick(i + 1); });
    head.append(tie);
  }
  made.append(head, element("pre", response.text, { tabindex: "0" }));
  return made;
}

function showPair() {
  const sides = [["A is better:", 0, 4], ["", 4, 6], ["B is better:", 6, 10]];
  for (const [head, first, last] of sides) {
    const side = element("div", "", { class: "side", role: "group", "aria-label": head || "neither" });
    if (head) side.append(element("span", head));
    for (const [key, text] of PAIR.slice(first, last)) side.append(button(text, key, () => answer(key)));
    $("answers").append(side);
  }
}

// ------------------------------------------------------------------ ranking

function pick(number) {
  if (groups.flat().includes(number)) return say(`${number} is ranked already`);
  if (ties && groups.length) groups.at(-1).push(number);
  else groups.push([number]);
  ties = false;
  say("");
  showRank();
}

function unpick() {
  if (ties) ties = false;
  else if (groups.length) {
    groups.at(-1).pop();
    if (!groups.at(-1).length) groups.pop();
  }
  showRank();
}

function join() {
  if (groups.length) ties = !ties;
  showRank();
}

function save() {
  if (groups.flat().length < state.turn.responses.length) return say("rank all of them first");
  answer(groups.map((group) => group.join("=")).join(" "));
}

function showRank() {
  const count = state.turn.responses.length;
  const picked = groups.flat();
  [...$("responses").children].forEach((made, i) => {
    const rank = groups.findIndex((group) => group.includes(i + 1)) + 1;
    const tied = rank && groups[rank - 1].length > 1;
    made.classList.toggle("picked", rank > 0);
    made.querySelector(".rank").textContent = rank ? `rank ${rank}${tied ? ", tied" : ""}` : "";
    made.querySelectorAll("button").forEach((each) => { each.disabled = rank > 0; });
    if (!rank) made.querySelector(".tie").disabled = !groups.length;
  });
  const order = groups.map((group) => group.join(" = ")).join(" > ");
  const more = picked.length < count ? (ties ? " = ..." : groups.length ? " > ..." : "") : "";
  $("picked").textContent = order ? `Best first: ${order}${more}` : "Best first: press the number of the best one";
  const saving = button("Save", "Enter", save);
  saving.classList.toggle("main", picked.length === count);
  saving.disabled = picked.length < count;
  const back = button("Take back", "Backspace", unpick);
  back.disabled = !groups.length;
  $("answers").replaceChildren(saving, back);
}

// ------------------------------------------------------------------ dialogs

let onText = null; // what to do with what is typed

function askText(label, text, act) {
  onText = act;
  $("ask-label").textContent = label;
  $("ask-text").value = text;
  $("ask").showModal();
  $("ask-text").focus();
}

function accept() {
  const text = $("ask-text").value.trim();
  $("ask").close();
  onText(text);
}

function fillHelp() {
  $("instructions").hidden = !state.instructions;
  $("instructions").textContent = state.instructions || "";
  const lines = [...KEYS[state.protocol], ...ALWAYS];
  $("keys").replaceChildren(...lines.flatMap(([key, text]) => {
    const name = element("dt");
    name.append(element("kbd", key));
    return [name, element("dd", text)];
  }));
}

const undo = () => send("/undo", {}, (told) => (told.undone ? "Taken back" : "Nothing to take back"));
const skip = () => state.turn && askText("Why skip this? (may stay empty)", "", (text) => answer(`s ${text}`));
const flag = () => state.turn && askText("What is wrong with it? It will enter no data.", "", (text) => answer(`f ${text}`));
const remark = () => state.turn && askText("Note", note, (text) => { note = text; say(text ? "Note is kept with this answer" : ""); });
const help = () => $("help").showModal();

function end() {
  document.querySelector("main").replaceChildren(element("p", "Sealed. You may close this page."));
  document.querySelector("footer").remove();
  $("place").textContent = "Sealed";
}

// ------------------------------------------------------------------ keys and buttons

const COMMANDS = { u: undo, s: skip, f: flag, m: remark, "?": help };

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !state) return;
  if (document.querySelector("dialog[open]")) {
    if (event.target === $("ask-text") && event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      accept();
    }
    return;
  }
  const onButton = event.target.tagName === "BUTTON" && (event.key === "Enter" || event.key === " ");
  if (onButton || !$("place").isConnected) return; // the button is pressed by it
  if (handle(event.key)) event.preventDefault();
});

function handle(key) {
  if (key === "j" || key === "k") {
    document.querySelector("main").scrollBy(0, key === "j" ? 120 : -120);
    return true;
  }
  if (COMMANDS[key]) return COMMANDS[key](), true;
  if (!state.turn) return false;
  if (state.protocol === "pair" && PAIR.some(([each]) => each === key)) return answer(key), true;
  if (state.protocol === "thumbs" && (key === "y" || key === "n")) return answer(key), true;
  if (state.protocol !== "rank") return false;
  const number = Number(key);
  if (key !== " " && number >= 1 && number <= state.turn.responses.length) return pick(number), true;
  if (key === "=" || key === " ") return join(), true;
  if (key === "Backspace") return unpick(), true;
  if (key === "Enter") return save(), true;
  return false;
}

for (const [id, act] of Object.entries({
  undo, skip, flag, "note-button": remark, "help-button": help,
  "ask-yes": accept, "ask-no": () => $("ask").close(), "help-close": () => $("help").close(),
  finish: () => send("/finish", {}, () => ""),
})) $(id).addEventListener("click", act);

ask("/turn").then(show, (error) => say(error.message));
