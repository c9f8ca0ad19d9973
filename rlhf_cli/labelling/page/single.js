"use strict";
// A response by itself: is it good, and which of its steps is the first wrong one?

const THUMBS = [["y", "Good"], ["n", "Bad"]];

const judge = (key) => answer(key, new Map(THUMBS).get(key).toLowerCase());

PROTOCOLS.thumbs = {
  keys: [["y", "good"], ["n", "bad"]],
  name: () => "",
  begin() {
    for (const [key, text] of THUMBS) $("answers").append(button(text, key, () => judge(key)));
  },
  key(key) {
    const known = THUMBS.some(([each]) => each === key);
    if (known) judge(key);
    return known;
  },
};

let step = null; // the first wrong one from 1 on, 0 where none is, null as long as it is not said
let typing = false; // whether a digit goes on the number before it

PROTOCOLS.steps = {
  keys: [
    ["digits", "the number of the first wrong step"], ["0", "no step is wrong"],
    ["↓ ↑", "the next step, the one before"], ["Enter", "save"],
  ],
  name: () => "",
  body: stepsOf,
  begin() {
    [step, typing] = [null, false];
    $("answers").replaceChildren(button("Save", "Enter", saveStep));
    showSteps();
  },
  key(key) {
    const count = state.turn.steps.length;
    if (/^[0-9]$/.test(key)) {
      const longer = 10 * step + Number(key);
      choose(typing && step && longer <= count ? longer : Number(key) <= count ? Number(key) : step);
      typing = true;
    } else if (key === "ArrowDown" || key === "ArrowUp") {
      choose(Math.min(count, Math.max(0, (step || 0) + (key === "ArrowDown" ? 1 : -1))));
      typing = false;
    } else if (key === "Enter") return saveStep(), true;
    else return false;
    say(meaningOfStep(), false);
    return true;
  },
};

function stepsOf() {
  const made = fieldset("Which step is the first wrong one?", "steps");
  const texts = [["0", "none: all of it is right"], ...state.turn.steps.map((text, i) => [String(i + 1), text])];
  for (const [value, text] of texts) {
    const content = [element("kbd", value), words(text)];
    made.append(choice("radio", "step", value, content, false, () => { typing = false; choose(Number(value)); }));
  }
  return made;
}

function choose(number) {
  step = number;
  say("");
  showSteps();
}

function showSteps() {
  document.querySelectorAll("#responses input").forEach((input) => {
    const number = Number(input.value);
    input.checked = number === step;
    const label = input.parentElement;
    label.classList.toggle("wrong", number > 0 && number === step);
    label.classList.toggle("after", step > 0 && number > step);
    if (!input.checked) return;
    label.scrollIntoView({ block: "nearest" });
    if (document.activeElement.name === input.name) input.focus(); // arrows go on from it
  });
  $("picked").textContent = step === null ? "" : meaningOfStep();
  const saving = $("answers").firstChild;
  saving.classList.toggle("main", step !== null);
  saving.disabled = step === null;
}

const meaningOfStep = () => (step ? `Step ${step} is the first wrong one` : "No step is wrong");

function saveStep() {
  if (step === null) return say("say which step is the first wrong one, or 0");
  answer(String(step), meaningOfStep());
}
