"use strict";
// Draws the figures of the page. Text, rules and backgrounds get their colours from the style sheet.
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = [...document.querySelectorAll(".chart")];
const mouse = matchMedia("(hover: hover)").matches;
const config = {
  responsive: true,
  displaylogo: false,
  doubleClick: "reset",
  displayModeBar: mouse ? "hover" : false,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  toImageButtonOptions: { format: "svg" },
};

for (const chart of charts) {
  const { data, layout } = figures[chart.dataset.figure];
  chart.textContent = "";
  // A finger that moves over a chart moves the page.
  Plotly.newPlot(chart, data, { ...layout, dragmode: mouse ? "zoom" : false }, config);
}

// Paper has another width than the screen, and nobody resizes it.
addEventListener("beforeprint", () => {
  for (const chart of charts) Plotly.relayout(chart, { autosize: false, width: chart.dataset.wide ? 660 : 316 });
});
addEventListener("afterprint", () => {
  for (const chart of charts) Plotly.relayout(chart, { autosize: true, width: null });
});
