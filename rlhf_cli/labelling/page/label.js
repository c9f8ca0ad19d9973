"use strict";
// One task after another: by key, mouse or screen reader. What models wrote is only ever text.

// What of the page belongs to a protocol, by its name; other files fill it:
// keys    lines of the help
// name    of a response, by its place among those shown
// body    what a card has in place of the text
// head    adds to the head of a card
// begin   is called once a turn is shown
// key     does what a key stands for, and returns whether it stands for anything
// undo    takes back what is not saved yet, and returns whether there was something
const PROTOCOLS = {};
const ALWAYS = [
  ["u", "take the last answer back"], ["s", "skip"], ["f", "flag what should enter no data"],
  ["m", "a note with this answer"], ["j, k", "scroll"], ["?", "this help"],
];

const SINGLES = "singles"; // whether keys of a single character work, as this browser remembers it

let state = null; // as the server told it last
let note = "";
let busy = false; // a request is under way
let seconds = 0; // that the task was looked at
let since = null; // since when it is, on the page's clock

function button(text, key, act, attributes = {}) {
  const made = element("button", text, { type: "button", "data-key": key, ...attributes });
  hint(made);
  made.addEventListener("click", act);
  return made;
}

function fieldset(legend, kind) {
  const made = element("fieldset", "", { class: kind });
  made.append(element("legend", legend));
  return made;
}

function choice(type, name, value, content, chosen, act) {
  const label = element("label");
  const input = element("input", "", { type, name, value, "data-key": value });
  hint(input);
  input.checked = chosen;
  input.addEventListener("change", () => act(input.checked));
  label.append(input, ...content);
  return label;
}

// ------------------------------------------------------------------ time that was spent looking

function look(visible) {
  if (since !== null) seconds += (performance.now() - since) / 1000;
  since = visible ? performance.now() : null;
}
document.addEventListener("visibilitychange", () => look(!document.hidden));

// ------------------------------------------------------------------ the server

async function send(path, body, saying) {
  if (busy) return;
  busy = true;
  try {
    const told = await ask(path, body);
    if (told.finished) return end();
    show(told);
    say(`${told.fault ? `${told.fault}: here is what is next` : saying(told)}. ${where()}`);
  } catch (error) {
    failed(error, path === "/answer" ? "Not saved: " : "");
  } finally {
    busy = false;
  }
}

// line: as the server reads it; meaning: in words, for whoever pressed a wrong key
function answer(line, meaning) {
  if (!state || !state.turn) return;
  look(!document.hidden);
  const { task, showing } = state.turn;
  send("/answer", { task, showing, line, note, seconds }, () => `Saved: ${meaning}`);
}

// ------------------------------------------------------------------ what is shown

function show(told) {
  state = told;
  [note, seconds] = ["", 0];
  since = document.hidden ? null : performance.now();
  const { turn, done, turns } = told;
  $("place").textContent = turn ? `Task ${done + 1} of ${turns}` : "Done";
  document.title = `${$("place").textContent} - label`;
  $("progress").max = turns;
  $("progress").value = done;
  $("task").hidden = !turn;
  $("done").hidden = Boolean(turn) && !told.may_finish;
  $("undo").disabled = done === 0;
  for (const id of ["answers", "form"]) $(id).replaceChildren();
  $("done-text").hidden = Boolean(turn);
  $("picked").textContent = "";
  $("finish").disabled = !told.may_finish;
  $("done-text").textContent = told.may_finish
    ? `All ${turns} tasks are labelled. You can still undo.`
    : `All your ${turns} tasks are labelled. Others have ${told.others_left} left; you may close this page.`;
  fillHelp();
  if (!turn) return $("done-text").focus();
  $("prompt").replaceChildren(...turn.prompt.flatMap(({ role, text }) => [
    ...(role ? [element("p", role, { class: "quiet" })] : []), words(text),
  ]));
  $("responses").className = turn.responses.length === 2 ? "two" : "";
  $("responses").replaceChildren(...turn.responses.map(card));
  mine().begin();
  scrolled().scrollTop = 0;
  $("prompt-head").focus({ preventScroll: true }); // what had it is gone
}

const where = () => $(state.turn ? "place" : "done-text").textContent;

// In a low window, or an enlarged one, all of the page scrolls.
function scrolled() {
  const main = document.querySelector("main");
  return getComputedStyle(main).overflowY === "auto" ? main : document.scrollingElement;
}

const mine = () => PROTOCOLS[state.protocol];

function card(response, i) {
  const id = `response-${i + 1}`;
  const made = element("article", "", { "aria-labelledby": id });
  const head = element("header");
  const title = element("h3", `Response ${mine().name(i)}`.trim(), { id });
  head.append(title, element("span", "", { class: "rank" }));
  if (response.cut) head.append(element("span", "cut at the most tokens", { class: "cut" }));
  if (mine().head) mine().head(head, i);
  const scrolling = { tabindex: "0", role: "group", "aria-labelledby": id };
  made.append(head, mine().body ? mine().body() : words(response.text, scrolling));
  return made;
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
  const lines = [...mine().keys, ...ALWAYS];
  $("keys").replaceChildren(...lines.flatMap(([key, text]) => {
    const name = element("dt");
    name.append(element("kbd", key));
    return [name, element("dd", text)];
  }));
}

const undo = () => (state.turn && mine().undo && mine().undo()) || send("/undo", {}, (told) => (told.undone ? "Taken back" : "Nothing to take back"));
const skip = () => state.turn && askText("Why skip this? (may stay empty)", "", (text) => answer(`s ${text}`, "skipped"));
const flag = () => state.turn && askText("What is wrong with it? It will enter no data.", "", (text) => answer(`f ${text}`, "flagged"));
const remark = () => state.turn && askText("Note", note, (text) => { note = text; say(text ? "Note is kept with this answer" : ""); });
const help = () => $("help").showModal();

const end = () => close("Sealed", "Sealed. You may close this page.");

// ------------------------------------------------------------------ keys and buttons

// They are in the way of whoever speaks to the machine, and of who touches keys by mistake (WCAG
// 2.1.4), so they can be turned off.
const singles = () => localStorage.getItem(SINGLES) !== "off";

function hint(made) { // at its key, as long as that works
  const { key } = made.dataset;
  if (key.length > 1 || singles()) made.setAttribute("aria-keyshortcuts", key);
  else made.removeAttribute("aria-keyshortcuts");
}

function turnSingles() {
  localStorage.setItem(SINGLES, $("singles").checked ? "on" : "off");
  document.querySelectorAll("[data-key]").forEach(hint);
}

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
  const pressed = { BUTTON: ["Enter", " "], INPUT: [" ", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"] };
  if ((pressed[event.target.tagName] || []).includes(event.key)) return; // it does what it does
  if ($("place").textContent === "Sealed") return;
  if (event.key.length === 1 && !singles()) return;
  if (handle(event.key)) event.preventDefault();
});

function handle(key) {
  if (key === "j" || key === "k") {
    scrolled().scrollBy(0, key === "j" ? 120 : -120);
    return true;
  }
  if (COMMANDS[key]) return COMMANDS[key](), true;
  return Boolean(state.turn) && mine().key(key);
}

for (const [id, act] of Object.entries({
  undo, skip, flag, "note-button": remark, "help-button": help,
  "ask-yes": accept, "ask-no": () => $("ask").close(), "help-close": () => $("help").close(),
  finish: () => send("/finish", {}, () => ""),
})) $(id).addEventListener("click", act);

$("singles").checked = singles();
$("singles").addEventListener("change", turnSingles);
document.querySelectorAll("[data-key]").forEach(hint);

document.addEventListener("DOMContentLoaded", () => ask("/turn").then(show, (error) => failed(error)));
