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
      if (head) side.append(element("span", head));
      for (const [key, text] of PAIR.slice(first, last)) side.append(button(text, key, () => answer(key)));
      $("answers").append(side);
    }
  },
  key(key) {
    const known = PAIR.some(([each]) => each === key);
    if (known) answer(key);
    return known;
  },
};

let groups = []; // of ranks: lists of shown numbers, best first
let ties = false; // whether the next pick joins the last group

const ranked = () => groups.map((group) => group.join("=")).join(" ");

function pick(number) {
  if (groups.flat().includes(number)) return say(`${number} is ranked already`);
  if (ties && groups.length) groups.at(-1).push(number);
  else groups.push([number]);
  ties = false;
  say("");
  showRanks();
}

function unpick() {
  if (ties) ties = false;
  else if (groups.length) {
    groups.at(-1).pop();
    if (!groups.at(-1).length) groups.pop();
  }
  showRanks();
}

function join() {
  if (groups.length) ties = !ties;
  showRanks();
}

function saveRanks() {
  if (groups.flat().length < state.turn.responses.length) return say("rank all of them first");
  mine().save();
}

function headOfRanked(head, i) {
  const tie = element("button", "Tie with last", { type: "button", class: "tie" });
  const best = button("Next best", String(i + 1), (event) => press(event, i + 1));
  tie.addEventListener("click", (event) => { ties = true; press(event, i + 1); });
  head.append(best, tie);
}

function press(event, number) {
  pick(number);
  if (event.detail > 0) return; // by mouse
  const next = document.querySelector("#responses button:enabled") || $("answers").querySelector("button");
  next.focus(); // the one that was pressed cannot keep it
}

function keyOfRanks(key) {
  const number = Number(key);
  if (key !== " " && number >= 1 && number <= state.turn.responses.length) return pick(number), true;
  if (key === "=" || key === " ") return join(), true;
  if (key === "Backspace") return unpick(), true;
  if (key === "Enter") return saveRanks(), true;
  return false;
}

function showRanks() {
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
  const saving = button("Save", "Enter", saveRanks);
  saving.classList.toggle("main", picked.length === count);
  saving.disabled = picked.length < count;
  const back = button("Take back", "Backspace", unpick);
  back.disabled = !groups.length;
  $("answers").replaceChildren(saving, back);
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
    showRanks();
  },
  save: () => answer(ranked()),
  key: keyOfRanks,
};
