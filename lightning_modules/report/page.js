// Without this script tables stand as they were written, and figures show everything.

// -- tables: sort by the column whose header is pressed
const NUMBER = /([+-]?(?:\d[\d,]*\.?\d*(?:e[+-]?\d+)?|∞))/i;
const value = (text) => Number(text.replaceAll(",", "").replace("∞", "Infinity"));
// Text and numbers in turn: "97.5 ± 0.4" is ["", "97.5", " ± ", "0.4", ""], so what begins with a number begins with "".
const parts = (cell) => cell.textContent.trim().replaceAll("−", "-").replace(/^[<>≤≥≈]\s*/, "").split(NUMBER);
const compare = (a, b) => {
  for (let i = 0; i < Math.min(a.length, b.length); i++) {
    const [x, y] = i % 2 ? [value(a[i]), value(b[i])] : [a[i], b[i]];
    const order = i % 2 ? (x > y) - (x < y) : x.localeCompare(y, "en");
    if (order) return order;
  }
  return a.length - b.length;
};
for (const table of document.querySelectorAll("table")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const numbers = !header.classList.contains("text");
    const last = (key) => (numbers ? key.length === 1 || key[0] !== "" : key.join("") === "");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...table.tBodies[0].rows].map((row) => [parts(row.cells[column]), row]);
      rows.sort(([a], [b]) => last(a) - last(b) || direction * compare(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      table.classList.add("sorted");
    });
  });
}

// -- legends: an entry that is pressed hides its lines in its figure
for (const key of document.querySelectorAll(".key")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "key";
  button.title = "show or hide";
  button.dataset.key = key.dataset.series;
  button.setAttribute("aria-pressed", "true");
  button.append(...key.childNodes);
  key.replaceWith(button);
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const off = button.getAttribute("aria-pressed") === "true";
    figure.querySelectorAll(`[data-key="${button.dataset.key}"]`)
      .forEach((other) => other.setAttribute("aria-pressed", String(!off)));
    figure.querySelectorAll(`.panel [data-series="${button.dataset.key}"]`)
      .forEach((lines) => lines.classList.toggle("off", off));
  });
}

// -- figures: the point of a line that is next to the pointer says its values
const REACH = 30; // points
const along = ([, low, high, log], share) => (log ? low * (high / low) ** share : low + (high - low) * share);
const short = (number) => number.toLocaleString("en", { maximumSignificantDigits: 4 });
const points = (line) => {
  const marks = [...line.querySelectorAll("use")].map((mark) => [+mark.getAttribute("x"), +mark.getAttribute("y")]);
  if (marks.length) return marks;
  const numbers = (line.querySelector("path")?.getAttribute("d").match(/-?[\d.]+/g) ?? []).map(Number);
  return numbers.flatMap((x, i) => (i % 2 ? [] : [[x, numbers[i + 1]]]));
};
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const svg of document.querySelectorAll("svg[data-axes]")) {
  const { frame: [left, bottom, right, top], x, y } = JSON.parse(svg.dataset.axes);
  const names = JSON.parse(svg.closest("[data-names]").dataset.names);
  const lines = [...svg.querySelectorAll("[data-kind=line]")].map((line) => [line, points(line)]);
  const dot = document.createElementNS(svg.namespaceURI, "circle");
  dot.setAttribute("r", 3.5);
  const hide = () => {
    tip.hidden = true;
    dot.remove();
  };
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = [REACH];
    for (const [line, all] of lines) {
      if (line.classList.contains("off")) continue;
      for (const [px, py] of all) {
        const distance = Math.hypot(px - at.x, py - at.y);
        const inside = px > left - 1 && px < right + 1 && py > top - 1 && py < bottom + 1;
        if (inside && distance < best[0]) best = [distance, px, py, line];
      }
    }
    if (best.length === 1) return hide();
    const [, px, py, line] = best;
    const [u, v] = [along(x, (px - left) / (right - left)), along(y, (py - bottom) / (top - bottom))];
    tip.textContent = `${names[line.dataset.series]}: ${short(v)} at ${short(u)}${x[0] && ` ${x[0]}`}`;
    dot.setAttribute("cx", px);
    dot.setAttribute("cy", py);
    svg.append(dot);
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(event.pageX + 14, scrollX + room))}px`;
    tip.style.top = `${event.pageY + 16}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
