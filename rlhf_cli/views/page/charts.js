"use strict";
// `data-chart` names a Vega-Lite specification in `data.charts`; they are drawn one after the other,
// those of a folded part when it is opened. `data-drawn` of the body is how many are, once all that
// are to be seen have been tried.

async function draw(place) {
  if (place.hasChildNodes()) return; // it is drawn, or about to be
  const options = {
    mode: "vega-lite",
    ast: true, // expressions are walked, not compiled: the page's policy allows no eval
    actions: false,
    renderer: "svg",
    config: data.theme,
  };
  const child = element("div");
  place.append(child);
  try {
    await vegaEmbed(child, data.charts[place.dataset.chart], options);
    place.dataset.drawn = "";
  } catch (error) {
    child.textContent = `This figure cannot be drawn: ${error.message}`;
    console.error(error);
  }
}

async function drawAll(places) {
  for (const place of places) {
    await draw(place);
    await new Promise((resolve) => setTimeout(resolve)); // the page answers meanwhile
  }
  document.body.dataset.drawn = document.querySelectorAll("[data-chart][data-drawn]").length;
}

for (const part of document.querySelectorAll("details")) {
  part.addEventListener("toggle", () => drawAll(part.querySelectorAll("[data-chart]")));
}
drawAll([...document.querySelectorAll("[data-chart]")].filter((place) => place.checkVisibility()));
