// Adds to a page that is complete without it: sorting and filtering of tables, and a switch of the colour scheme.
(() => {
  "use strict";
  const root = document.documentElement;

  const make = (name, properties) => Object.assign(document.createElement(name), properties);

  // --- colour scheme ---
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const other = () => (shown() === "dark" ? "light" : "dark");
  const toggle = make("button", { type: "button", id: "theme" });
  const label = () => { toggle.textContent = other() === "dark" ? "Dark" : "Light"; };
  const remember = (theme) => {
    // A browser may refuse storage to files: then the choice lasts as long as the page.
    try { localStorage.setItem("theme", theme); } catch { /* nothing to do */ }
  };
  try {
    const stored = localStorage.getItem("theme");
    if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  } catch { /* as above */ }
  toggle.addEventListener("click", () => { root.dataset.theme = other(); remember(root.dataset.theme); label(); });
  toggle.title = "Switch between light and dark";
  dark.addEventListener("change", label);
  label();
  (document.querySelector("header") || document.querySelector("main")).prepend(toggle);

  // --- tables ---
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

  const read = (cell) => {
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.classList.contains("missing") ? null : cell.textContent;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));

  const sort = (table, column, order) => {
    const body = table.tBodies[0];
    const rows = table.originalRows;
    const values = new Map(rows.map((row) => [row, read(row.cells[column])]));
    const sign = order === "descending" ? -1 : 1;
    const sorted = order === "none" ? rows : [...rows].sort((one, two) => {
      const [a, b] = [values.get(one), values.get(two)];
      if (a === null || b === null) return (a === null) - (b === null); // what is not known stays at the end
      return sign * compare(a, b);
    });
    body.append(...sorted);
    [...table.tHead.rows[0].cells].forEach((head, at) => {
      head.setAttribute("aria-sort", at === column ? order : "none");
    });
  };

  const addFilter = (table) => {
    const input = make("input", { type: "search" });
    const line = make("label", { className: "filter", textContent: "Filter rows" });
    line.append(input);
    const texts = table.originalRows.map((row) => row.textContent.toLowerCase());
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/);
      table.originalRows.forEach((row, at) => { row.hidden = !words.every((word) => texts[at].includes(word)); });
    });
    table.closest(".wide").before(line);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    table.originalRows = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, column, NEXT[head.getAttribute("aria-sort")]));
    });
    if (table.originalRows.length > 15) addFilter(table);
    if (table.originalRows.length > 25) table.closest(".wide").classList.add("tall");
  }
})();
