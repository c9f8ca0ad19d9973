"use strict";
// Responses beside each other: ranks with ties, and which of two is better.

const PAIR = [
  ["1", "much"], ["2", "clearly"], ["3", "somewhat"], ["4", "slightly"],
  ["5", "Tie"], ["6", "Both bad"],
  ["7", "slightly"], ["8", "somewhat"], ["9", "clearly"], ["0", "much"],
];

PROTOCOLS.pair = {
  keys: [
    ["1 2 3 4", "A is much, clearly, somewhat, slightly better"], ["5", "a tie"],
    ["6", "both are bad"], ["7 8 9 0", "B is slightly, somewhat, clearly, much better"],
  ],
  name: (i) => "AB"[i],
  begin() {
    const sides = [["A is better:", 0, 4], ["", 4, 6], ["B is better:", 6, 10]];
    for (const [head, first, last] of sides) {
      const side = element("div", "", { class: "side", role: "group", "aria-label": head || "neither" });
      if (head) side.append(element("span", head, { id: `side-${first}` }));
      for (const [key, text] of PAIR.slice(first, last)) {
        const naming = head ? { id: `pair-${key}`, "aria-labelledby": `side-${first} pair-${key}` } : {};
        side.append(button(text, key, () => prefer(key), naming));
      }
      $("answers").append(side);
    }
  },
  key(key) {
    const known = PAIR.some(([each]) => each === key);
    if (known) prefer(key);
    return known;
  },
};

function prefer(key) {
  const [, text] = PAIR.find(([each]) => each === key);
  const better = "56".includes(key) ? "" : "1234".includes(key) ? "A" : "B";
  answer(key, better ? `${better} is ${text} better` : text.toLowerCase());
}

let groups = []; // of ranks: lists of shown numbers, best first
let ties = false; // whether the next pick joins the last group

const ranked = () => groups.map((group) => group.join("=")).join(" ");
const both = (group) => group.join(" and ");
const spelled = () => groups.map((group) => (group.length > 1 ? `${both(group)} tied` : group)).join(", then ");

function left() {
  const count = state.turn.responses.length - groups.flat().length;
  return count ? `${count} left` : "All are ranked, Enter saves";
}

function pick(number, event) {
  if (groups.flat().includes(number)) return say(`response ${number} is ranked already`);
  const tied = ties && groups.length ? groups.at(-1) : [];
  const and = tied.length ? `, tied with ${both(tied)}` : "";
  if (tied.length) tied.push(number);
  else groups.push([number]);
  ties = false;
  say(`Response ${number} has rank ${groups.length}${and}. ${left()}`, false);
  showRanks(event);
}

function unpick(event) {
  if (ties) return join();
  if (!groups.length) return say("nothing is ranked yet");
  const number = groups.at(-1).pop();
  if (!groups.at(-1).length) groups.pop();
  say(`Response ${number} has no rank. ${left()}`, false);
  showRanks(event);
}

function join() {
  if (!groups.length) return say("rank one first, then the next can tie with it");
  ties = !ties;
  say(ties ? `The next one ties with ${both(groups.at(-1))}` : "The next one does not tie", false);
  showRanks();
}

function saveRanks() {
  if (groups.flat().length < state.turn.responses.length) return say(`rank all of them first, ${left()}`);
  mine().save();
}

function headOfRanked(head, i) {
  const title = `response-${i + 1}`;
  const named = (id) => ({ id, "aria-labelledby": `${id} ${title}` });
  const best = button("Next best", String(i + 1), (event) => pick(i + 1, event), named(`best-${i + 1}`));
  const tie = element("button", "Tie with last", { type: "button", class: "tie", ...named(`tie-${i + 1}`) });
  tie.addEventListener("click", (event) => { ties = true; pick(i + 1, event); });
  head.append(best, tie);
}

function beginRanks() {
  $("answers").replaceChildren(button("Save", "Enter", saveRanks), button("Take back", "Backspace", unpick));
  showRanks();
}

// had: what had the focus; a button that was disabled by being pressed cannot keep it. Whoever clicks
// goes on by mouse.
function passFocus(had, event) {
  if (!had.disabled || (event && event.detail > 0)) return;
  document.querySelector("#responses button:enabled, #answers button:enabled").focus();
}

function keyOfRanks(key) {
  const number = Number(key);
  if (key !== " " && number >= 1 && number <= state.turn.responses.length) return pick(number), true;
  if (key === "=" || key === " ") return join(), true;
  if (key === "Backspace") return unpick(), true;
  if (key === "Enter") return saveRanks(), true;
  return false;
}

// event: the click that changed them, where it was one
function showRanks(event) {
  const had = document.activeElement;
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
  const [saving, back] = $("answers").children;
  saving.classList.toggle("main", picked.length === count);
  saving.disabled = picked.length < count;
  back.disabled = !groups.length;
  passFocus(had, event);
}

const RANKS = [
  ["1 to 9", "the next best response"], ["= or Space", "the next pick ties with the last one"],
  ["Backspace", "take the last pick back"], ["Enter", "save, once all are ranked"],
];

PROTOCOLS.rank = {
  keys: RANKS,
  name: (i) => String(i + 1),
  head: headOfRanked,
  begin() {
    [groups, ties] = [[], false];
    beginRanks();
  },
  save: () => answer(ranked(), spelled()),
  key: keyOfRanks,
};
