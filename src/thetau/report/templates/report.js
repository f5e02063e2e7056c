"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const said = document.getElementById("said");
  const tip = document.getElementById("tip");

  // The theme: the system's until it is switched.
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => {
    theme.setAttribute("aria-pressed", String(dark()));
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();

  // Tables: any heading sorts, words filter.
  const valueOf = (cell, numeric) => {
    if (!cell) return numeric ? NaN : "";
    if (!numeric) return cell.textContent;
    const given = cell.dataset.v;
    return given === undefined ? parseFloat(cell.textContent.replace(/,/g, "").replace("−", "-")) : given === "" ? NaN : Number(given);
  };
  const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  for (const table of all("table")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = all("thead th", table);
    heads.forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      if (head.title) button.title = head.title;
      head.replaceChildren(button);
      const numeric = head.classList.contains("n");
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === (numeric ? "descending" : "ascending");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        const rising = numeric ? down : !down;
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const keyed = rows.map((row, index) => [valueOf(row.cells[place], numeric), index, row]);
        keyed.sort((a, b) => {
          if (!numeric) return (rising ? 1 : -1) * words.compare(a[0], b[0]) || a[1] - b[1];
          const lost = Number(Number.isNaN(a[0])) - Number(Number.isNaN(b[0]));
          return lost || (a[0] === b[0] || Number.isNaN(a[0]) ? a[1] - b[1] : (rising ? 1 : -1) * (a[0] - b[0]));
        });
        body.append(...keyed.map((one) => one[2]));
        said.textContent = `Sorted by ${button.textContent}, ${rising ? "ascending" : "descending"}`;
      });
    });
    const frame = table.closest(".table");
    const label = frame.querySelector(".filter");
    if (!label || rows.length < 6) continue;
    label.hidden = false;
    const count = frame.querySelector(".count");
    const named = (cell) => !cell.classList.contains("n"); // a digit is looked for in names, not in every number
    const texts = rows.map((row) => [...row.cells].filter(named).map((cell) => cell.textContent.toLowerCase()).join("\n"));
    label.querySelector("input").addEventListener("input", (event) => {
      const wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      let kept = 0;
      rows.forEach((row, index) => {
        row.hidden = !wanted.every((word) => texts[index].includes(word));
        kept += Number(!row.hidden);
      });
      count.textContent = wanted.length ? `${kept} of ${rows.length}` : "";
    });
  }

  // What is pointed at, or reached by the keys, is said beside it.
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
  };
  const hide = () => {
    tip.hidden = true;
  };
  for (const drawn of all(".drawn")) {
    const svg = drawn.querySelector("svg");
    const data = drawn.parentElement.querySelector(".cells");
    if (data) heatmap(drawn, svg, JSON.parse(data.textContent));
    else marks(drawn);
    drawn.addEventListener("pointerleave", hide);
    drawn.addEventListener("blur", hide);
  }
  function marks(drawn) {
    const known = all("[data-tip]", drawn);
    let here = -1;
    drawn.addEventListener("pointermove", (event) => {
      const mark = event.target.closest("[data-tip]");
      if (mark) show(mark.dataset.tip, event.clientX, event.clientY);
      else hide();
    });
    drawn.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !known.length) return;
      event.preventDefault();
      if (known[here]) known[here].classList.remove("here");
      here = (here + step + known.length) % known.length;
      known[here].classList.add("here");
      known[here].scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = known[here].getBoundingClientRect();
      show(known[here].dataset.tip, box.x + box.width / 2, box.y + box.height / 2);
      said.textContent = known[here].dataset.tip;
    });
  }
  function heatmap(drawn, svg, data) {
    const columns = data.columns.length ? data.columns : data.rows;
    const values = data.values.map((row) => row.replace(/(^| )-/g, "$1−").split(" "));
    const cursor = svg.querySelector(".cursor");
    let i = -1;
    let j = -1;
    const text = () => `${data.rows[i]} × ${columns[j]}: ${values[i][j]}`;
    const point = () => {
      cursor.setAttribute("x", data.x + j * data.w);
      cursor.setAttribute("y", data.y + i * data.h);
      cursor.setAttribute("visibility", "visible");
    };
    drawn.addEventListener("pointermove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const column = Math.floor((place.x - data.x) / data.w);
      const row = Math.floor((place.y - data.y) / data.h);
      if (!(row in values) || !(column in values[row])) {
        hide();
        return;
      }
      i = row;
      j = column;
      point();
      show(text(), event.clientX, event.clientY);
    });
    drawn.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowUp: [-1, 0] }[event.key];
      if (!step || !values.length || !columns.length) return;
      event.preventDefault();
      i = Math.max(0, Math.min(values.length - 1, i < 0 ? 0 : i + step[0]));
      j = Math.max(0, Math.min(columns.length - 1, j < 0 ? 0 : j + step[1]));
      point();
      cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = cursor.getBoundingClientRect();
      show(text(), box.x + box.width, box.y + box.height);
      said.textContent = text();
    });
  }
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  addEventListener("beforeprint", () => all("details").forEach((one) => (one.open = true)));
})();
