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

// Screen readers speak it, too; what only they need is not seen. The same words a second time would
// not be a change, and not be spoken.
function say(text, seen = true) {
  const again = text && $("message").textContent === text;
  $("message").className = seen ? "" : "spoken";
  $("message").textContent = again ? `${text}\u00a0` : text;
}

function failed(error, what = "") {
  const lost = error instanceof TypeError;
  say(what + (lost ? "the server does not answer: run the same command again" : error.message));
}

// The last words of a page; they have the focus, as what had it is gone.
function close(place, text) {
  const last = element("p", text, { tabindex: "-1" });
  document.querySelector("main").replaceChildren(last);
  document.querySelector("footer").remove();
  $("place").textContent = place;
  last.focus();
}

// What models and people wrote: of whatever language and direction.
function words(text, attributes = {}) {
  return element("pre", text, { lang: "", dir: "auto", ...attributes });
}
