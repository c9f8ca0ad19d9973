"use strict";
// A figure names its Vega-Lite specification in `data.charts`; they are drawn one after the other.
// Then the body has `data-drawn`, the number of those that are, and a figure that is not says why.

async function draw(figure) {
  const place = figure.querySelector(".chart");
  const options = {
    ast: true, // expressions are walked, not compiled: the page's policy allows no eval
    actions: false,
    renderer: "svg",
    config: data.theme,
  };
  try {
    await vegaEmbed(place, data.charts[figure.dataset.chart], options);
    return 1;
  } catch (error) {
    place.textContent = `This figure cannot be drawn: ${error.message}`;
    console.error(error);
    return 0;
  }
}

(async () => {
  let drawn = 0;
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    drawn += await draw(figure);
  }
  document.body.dataset.drawn = drawn;
})();
