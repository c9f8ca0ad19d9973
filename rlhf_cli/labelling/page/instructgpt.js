"use strict";
// As InstructGPT asked (2203.02155, table 3): each response gets a rating and marks, one after the
// other, and then all of them are ranked.

let ratings = []; // of each shown response: its score, null without one, and the keys of its marks
let at = 0; // which of them is rated; their number where they are ranked

PROTOCOLS.instructgpt = {
  keys: [
    ["1 to 7", "rate the response, 7 is best"], ["letters", "a mark, as it stands beside it"],
    ["Enter", "the next response, then their ranks"], ["u or Backspace", "one step back"],
    ...RANKS.map(([key, text]) => [key, `ranks: ${text}`]),
  ],
  name: (i) => String(i + 1),
  head: headOfRanked,
  begin() {
    [groups, ties, at] = [[], false, 0];
    ratings = state.turn.responses.map(() => ({ score: null, marks: new Set() }));
    showStep();
  },
  save: () => answer([...ratings.map(lineOf), ranked()].join("\n"), spelled()),
  undo: back,
  key(key) {
    if (at === ratings.length) return key === "Backspace" && !groups.length ? back() : keyOfRanks(key);
    if (/^[1-7]$/.test(key) || state.marks.some((mark) => mark.key === key)) return tick(key);
    if (key === "Enter") return next(), true;
    return key === "Backspace" && back();
  },
};

const lineOf = ({ score, marks }) => [score, ...marks].join(" ");

function tick(key) {
  const input = document.querySelector(`#form input[value='${key}']`);
  input.click();
  const mark = state.marks.find((each) => each.key === key);
  say(mark ? `${mark.text}: ${input.checked ? "marked" : "not marked"}` : `Rated ${key} of 7`, false);
  return true;
}

function next() {
  if (ratings[at].score === null) return say("rate it from 1 to 7 first");
  at += 1;
  say("");
  showStep();
}

function back() {
  if (at === 0) return false;
  at -= 1;
  [groups, ties] = [[], false];
  say("");
  showStep();
  return true;
}

function showStep() {
  const count = ratings.length;
  const ranking = at === count;
  [...$("responses").children].forEach((made, i) => {
    made.hidden = !ranking && i !== at;
    made.classList.toggle("rating", !ranking);
    made.querySelector("h3").textContent = `Response ${i + 1}${ranking ? `, rated ${ratings[i].score}` : ""}`;
  });
  $("responses-head").textContent = ranking ? "Responses, to be ranked" : `Response ${at + 1} of ${count}, to be rated`;
  $("form").replaceChildren(...(ranking ? [] : [ratingOf(ratings[at]), marksOf(ratings[at])]));
  if (ranking) beginRanks();
  else {
    $("answers").replaceChildren(button(at + 1 < count ? "Next response" : "On to ranks", "Enter", next));
    showRating();
  }
  $("undo").disabled = at === 0 && state.done === 0;
  $("responses-head").focus({ preventScroll: true }); // and is spoken: it says what is to be done
  scrolled().scrollTop = 0;
}

function showRating() {
  const { score, marks } = ratings[at];
  const names = state.marks.filter((mark) => marks.has(mark.key)).map((mark) => mark.text);
  $("picked").textContent = [score === null ? "" : `${score} of 7`, ...names].filter(Boolean).join("; ");
  const on = $("answers").firstChild;
  on.classList.toggle("main", score !== null);
  on.disabled = score === null;
}

function ratingOf(rating) {
  const made = fieldset("Overall quality, from 1 (worst) to 7 (best)", "scores");
  for (let score = 1; score <= 7; score += 1) {
    made.append(choice("radio", "score", String(score), [String(score)], rating.score === score, () => {
      rating.score = score;
      say("");
      showRating();
    }));
  }
  return made;
}

function marksOf(rating) {
  const made = fieldset("What holds of it", "marks");
  for (const { key, text } of state.marks) {
    made.append(choice("checkbox", "marks", key, [element("kbd", key, { "aria-hidden": "true" }), element("span", text)], rating.marks.has(key), (on) => {
      if (on) rating.marks.add(key);
      else rating.marks.delete(key);
      showRating();
    }));
  }
  return made;
}
