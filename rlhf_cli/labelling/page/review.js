"use strict";
// What annotators disagree on, with the names of all. What models and people wrote is only ever text.

let protocol = "";

function button(text, act) {
  const made = element("button", text, { type: "button" });
  made.addEventListener("click", act);
  return made;
}

async function send(path, body, act) {
  try {
    act(await ask(path, body));
  } catch (error) {
    failed(error);
  }
}

function nameOf(i) {
  if (protocol === "pair") return "AB"[i];
  return protocol === "thumbs" || protocol === "steps" ? "" : String(i + 1);
}

function show(told) {
  protocol = told.protocol;
  $("place").textContent = `${told.tasks.length} tasks to review`;
  $("how").textContent = told.how;
  const made = told.tasks.map(taskOf);
  $("tasks").replaceChildren(...made);
}

function taskOf(task, i) {
  const made = element("section", "", { "aria-labelledby": `task-${i}` });
  made.append(element("h2", `Task ${i + 1}`, { id: `task-${i}` }));
  for (const { role, text } of task.prompt) {
    if (role) made.append(element("p", role, { class: "quiet" }));
    made.append(words(text));
  }
  const cards = element("div", "", { class: "cards" });
  cards.append(...task.responses.map((response, place) => responseOf(task, response, `${i}-${place}`, place)));
  made.append(cards, answersOf(task), settlingOf(task, i));
  return made;
}

function responseOf(task, response, id, place) {
  const made = element("article", "", { "aria-labelledby": `response-${id}` });
  const head = element("header");
  const title = element("h3", `Response ${nameOf(place)}`.trim(), { id: `response-${id}` });
  head.append(title, element("span", response.policy));
  if (typeof response.reward === "number") head.append(element("span", `reward ${response.reward.toPrecision(3)}`));
  const steps = task.steps.map((text, number) => `${number + 1}: ${text}`).join("\n");
  const scrolling = { tabindex: "0", role: "group", "aria-labelledby": title.id };
  made.append(head, words(steps || response.text, scrolling));
  return made;
}

function answersOf(task) {
  const made = element("table", "", { class: "said" });
  made.append(element("caption", "What was said", { class: "quiet" }));
  const heads = element("tr");
  for (const text of ["who", "answer", "note", "settle"]) heads.append(element("th", text, { scope: "col" }));
  made.append(heads);
  for (const { who, line, note, reviewed } of task.answers) {
    const row = element("tr");
    const said = element("td");
    said.append(element("pre", line));
    const take = element("td");
    take.append(button("Take", () => settle(task, line)));
    take.firstChild.setAttribute("aria-label", `take what ${who} says`);
    row.append(element("th", who, { scope: "row" }), said, element("td", reviewed ? "reviewed" : note), take);
    made.append(row);
  }
  return made;
}

function settlingOf(task, i) {
  const made = element("div", "", { class: "settle" });
  const label = element("label", "Or your own answer");
  const text = element("textarea", "", { rows: "1", id: `own-${i}` });
  label.append(text);
  const saving = button("Save", () => settle(task, text.value));
  saving.id = `save-${i}`;
  saving.setAttribute("aria-labelledby", `save-${i} task-${i}`);
  made.append(label, saving);
  return made;
}

function settle(task, line) {
  const again = document.activeElement && document.activeElement.closest("section");
  const place = [...$("tasks").children].indexOf(again);
  send("/review", { task: task.task, line }, (told) => {
    show(told);
    say(`Saved: task ${place + 1} of ${told.tasks.length}`);
    const next = $("tasks").children[place + 1] || $("tasks").children[place];
    const at = next && next.querySelector("button");
    if (at) at.focus();
  });
}

$("finish").addEventListener("click", () => send("/finish", {}, ({ changed }) => {
  close("Finished", `${changed ? "Sealed" : "Nothing was changed"}. You may close this page.`);
}));

document.addEventListener("DOMContentLoaded", () => send("/disagreements", undefined, show));
