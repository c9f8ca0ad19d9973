"use strict";
// What the pages share. What models and people wrote is only ever text.

const $ = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

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

function say(text) {
  $("message").textContent = text;
}

function failed(error) {
  const lost = error instanceof TypeError;
  say(lost ? "the server does not answer: run the same command again" : error.message);
}
