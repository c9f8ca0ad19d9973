"use strict";
// A response by itself: is it good, and which of its steps is the first wrong one?

PROTOCOLS.thumbs = {
  keys: [["y", "good"], ["n", "bad"]],
  name: () => "",
  begin() {
    $("answers").append(button("Good", "y", () => answer("y")), button("Bad", "n", () => answer("n")));
  },
  key(key) {
    if (key === "y" || key === "n") return answer(key), true;
    return false;
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
    } else if (key === "Enter") saveStep();
    else return false;
    return true;
  },
};

function stepsOf() {
  const made = fieldset("Which step is the first wrong one?", "steps");
  const texts = [["0", "none: all of it is right"], ...state.turn.steps.map((text, i) => [String(i + 1), text])];
  for (const [value, text] of texts) {
    const content = [element("kbd", value), element("pre", text)];
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
    if (input.checked) label.scrollIntoView({ block: "nearest" });
  });
  $("picked").textContent = step === null ? "" : step ? `Step ${step} is the first wrong one` : "No step is wrong";
  const saving = button("Save", "Enter", saveStep);
  saving.classList.toggle("main", step !== null);
  saving.disabled = step === null;
  $("answers").replaceChildren(saving);
}

function saveStep() {
  if (step === null) return say("say which step is the first wrong one, or 0");
  answer(String(step));
}
