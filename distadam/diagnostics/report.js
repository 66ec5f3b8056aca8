// Readouts: the slider over a chart moves a line and says what is there. Charts are complete without it.
"use strict";
// A cell is thousandths of a decade, or a word, or nothing.
const spell = (code) => {
  if (typeof code !== "number") return code ?? "nothing recorded";
  return String(Number((10 ** (code / 1000)).toPrecision(3)));
};
for (const figure of document.querySelectorAll("figure[data-id]")) {
  const data = JSON.parse(document.getElementById(figure.dataset.id).textContent);
  const area = figure.querySelector(".area"), input = area.querySelector("input"), output = figure.querySelector("output");
  const cross = area.querySelector(".cross"), crossRow = area.querySelector(".cross-row");
  const resting = output.textContent;
  let row = 0;
  const show = () => {
    const column = Number(input.value);
    let text = data.x[column];
    for (const series of data.series || []) {
      const value = series.text[column];
      if (value) text += "  \u00b7  " + (data.series.length > 1 ? series.name + " " : "") + value;
    }
    if (data.rows) {
      text += "  \u00b7  " + data.rows[row] + "  \u00b7  " + spell(data.codes[row][column]);
      crossRow.style.top = 100 * (row + 0.5) / data.rows.length + "%";
    }
    cross.style.left = 100 * data.at[column] + "%";
    area.classList.add("on");
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  const hide = () => {
    if (document.activeElement === input) return;
    area.classList.remove("on");
    output.textContent = resting;
  };
  const point = (event) => {
    const box = area.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    let best = 0;
    for (let i = 0; i < data.at.length; i++) if (Math.abs(data.at[i] - x) < Math.abs(data.at[best] - x)) best = i;
    input.value = best;
    if (data.rows) {
      const y = Math.floor((event.clientY - box.top) / box.height * data.rows.length);
      row = Math.min(data.rows.length - 1, Math.max(0, y));
    }
    show();
  };
  input.addEventListener("pointermove", point);
  input.addEventListener("pointerdown", point);
  input.addEventListener("pointerleave", hide);
  input.addEventListener("focus", show);
  input.addEventListener("blur", hide);
  input.addEventListener("input", show);
  if (data.rows) {
    input.addEventListener("keydown", (event) => {
      const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      row = Math.min(data.rows.length - 1, Math.max(0, row + move));
      show();
    });
  }
}
