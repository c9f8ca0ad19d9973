"use strict";
// What all scripts of the page share.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element; children are elements or text, and text is never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
