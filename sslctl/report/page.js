"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// --- Light and dark: as the system has it, or as the reader chose ---

const root = document.documentElement;
const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
});

// --- Curves: the values at the epoch under the pointer ---

const place = (tip, box, x, y) => {
  tip.hidden = false;
  const left = x + 14 + tip.offsetWidth > box.width ? x - 14 - tip.offsetWidth : x + 14;
  tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth)) + "px";
  tip.style.top = Math.max(0, y - tip.offsetHeight / 2) + "px";
};

const nearest = (points, x) => {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
};

for (const figure of document.querySelectorAll(".chart")) {
  const chart = data.charts[figure.dataset.chart];
  const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip");
  const guide = figure.querySelector(".guide"), dots = [...figure.querySelectorAll(".dot")];
  const [left, right, top, bottom, width, height] = data.box;
  const across = v => left + (v - chart.x[0]) / (chart.x[1] - chart.x[0]) * (width - left - right);
  const down = v => height - bottom - (v - chart.y[0]) / (chart.y[1] - chart.y[0]) * (height - top - bottom);
  let at = null;
  const hide = () => {
    tip.hidden = true;
    guide.setAttribute("x1", -9); guide.setAttribute("x2", -9);
    dots.forEach(dot => { dot.setAttribute("cx", -9); dot.setAttribute("cy", -9); });
  };
  const show = epoch => {
    const found = chart.series.map(s => nearest(s.points, epoch));
    at = found.reduce((a, b) => Math.abs(b[0] - epoch) < Math.abs(a[0] - epoch) ? b : a)[0];
    guide.setAttribute("x1", across(at)); guide.setAttribute("x2", across(at));
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = "epoch " + at;
    tip.append(head);
    found.forEach((point, i) => {
      dots[i].setAttribute("cx", across(point[0])); dots[i].setAttribute("cy", down(point[1]));
      if (i > 11) return;
      const line = document.createElement("div");
      if (chart.series.length > 1) {
        const key = document.createElement("i");
        key.className = "key c" + chart.series[i].colour;
        line.append(key, chart.series[i].name + ": ");
      }
      line.append(String(point[1]));
      tip.append(line);
    });
    const box = svg.getBoundingClientRect(), scale = box.width / width;
    place(tip, box, across(at) * scale, svg.offsetTop || (box.top - figure.getBoundingClientRect().top) + 60);
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    show(chart.x[0] + (x - left) / (width - left - right) * (chart.x[1] - chart.x[0]));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const points = chart.series[0].points;
    const now = points.findIndex(p => p[0] >= (at ?? points[0][0]));
    show(points[Math.max(0, Math.min(points.length - 1, now + (event.key === "ArrowRight" ? 1 : -1)))][0]);
  });
}

// --- Maps: the image under the pointer, all images, one class ---

const tile = index => {
  const made = document.createElement("span"), sheet = data.sheet;
  made.className = "tile s-map";
  const column = index % sheet.columns, row = Math.floor(index / sheet.columns);
  made.style.backgroundPosition =
    100 * column / Math.max(1, sheet.columns - 1) + "% " + 100 * row / Math.max(1, sheet.rows - 1) + "%";
  return made;
};

for (const figure of document.querySelectorAll(".map")) {
  const map = data.maps[figure.dataset.map], svg = figure.querySelector("svg");
  const tip = figure.querySelector(".tip"), thumbs = figure.querySelector(".thumbs");
  const marks = [...figure.querySelectorAll(".field .mark")], field = figure.querySelector(".field");
  let only = null;
  const shown = i => only === null || map.labels[i] === only;
  const fill = () => {
    thumbs.replaceChildren();
    const taken = new Set();
    map.points.forEach(([x, y], i) => {
      if (!shown(i)) return;
      const cells = [];
      for (const dx of [-11, 11]) for (const dy of [-11, 11]) cells.push(Math.floor((x + dx) / 23) + " " + Math.floor((y + dy) / 23));
      if (cells.some(cell => taken.has(cell))) return;
      cells.forEach(cell => taken.add(cell));
      const image = tile(i);
      image.style.left = x / 10 + "%";
      image.style.top = y / 10 + "%";
      thumbs.append(image);
    });
  };
  field.addEventListener("pointermove", event => {
    const box = field.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * 1000, y = (event.clientY - box.top) / box.height * 1000;
    let best = -1, least = (24 * 1000 / box.width) ** 2;
    map.points.forEach((p, i) => {
      const distance = (p[0] - x) ** 2 + (p[1] - y) ** 2;
      if (distance < least && shown(i)) { least = distance; best = i; }
    });
    if (best < 0) { tip.hidden = true; return; }
    tip.replaceChildren();
    if (data.sheet) tip.append(tile(best));
    if (map.kinds.length > 1) {
      const name = document.createElement("strong");
      name.textContent = map.kinds[map.labels[best]];
      tip.append(name, document.createElement("br"));
    }
    tip.append(data.names[best]);
    place(tip, box, map.points[best][0] * box.width / 1000, map.points[best][1] * box.height / 1000);
  });
  field.addEventListener("pointerleave", () => { tip.hidden = true; });
  const toggle = figure.querySelector(".switch");
  const images = on => {
    toggle.setAttribute("aria-pressed", on);
    toggle.textContent = on ? "show points" : "show images";
    thumbs.hidden = !on;
    if (on) fill();
  };
  if (toggle) {
    toggle.addEventListener("click", () => images(thumbs.hidden));
    if (map.kinds.length === 1) images(true); // without classes the images themselves say more than points
  }
  for (const button of figure.querySelectorAll(".kinds button")) {
    button.addEventListener("click", () => {
      const kind = Number(button.dataset.kind);
      only = only === kind ? null : kind;
      for (const other of figure.querySelectorAll(".kinds button"))
        other.setAttribute("aria-pressed", Number(other.dataset.kind) === only);
      for (const mark of marks) mark.classList.toggle("faded", only !== null && Number(mark.dataset.kind) !== only);
      if (!thumbs.hidden) fill();
    });
  }
}
