"use strict";
// Tables sort by a click on a heading and filter by what is typed. Cells are read as text alone and never parsed as
// markup; rows are moved or hidden, nothing else changes. Without this script the tables are complete.
(() => {
  const FILTERED = 12; // rows above which a table has a filter
  const collator = new Intl.Collator(undefined, { numeric: true });
  const textOf = (cell) => cell.textContent.replaceAll("\u00a0", " ").trim();

  // "95.0 ± 5.0" is 95, "12.3 (1.0 to 4.5)" is 12.3, "< 0.0001" is a little less than 0.0001; "none" is no number.
  function numberOf(text) {
    const match = /^(?:p\s*)?([<>=]?)\s*([-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?)/i.exec(text);
    if (!match) return null;
    const value = Number(match[2].replaceAll(",", "").replace("\u2212", "-"));
    const beyond = 1e-6 * Math.max(Math.abs(value), 1e-12);
    return match[1] === "<" ? value - beyond : match[1] === ">" ? value + beyond : value;
  }

  // Rows without a value come last in both directions; equal ones keep their order.
  function ordered(rows, column, words, sign) {
    const keys = new Map(rows.map((row) => {
      const text = textOf(row.cells[column]);
      return [row, words ? text || null : numberOf(text)];
    }));
    return [...rows].sort((first, second) => {
      const [a, b] = [keys.get(first), keys.get(second)];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (words ? collator.compare(a, b) : a - b);
    });
  }

  function makeSortable(table) {
    const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (next) head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        body.append(...(next ? ordered(rows, column, head.classList.contains("word"), sign) : rows));
      });
    });
  }

  function makeFilter(table) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length <= FILTERED) return;
    const texts = new Map(rows.map((row) => [row, [...row.cells].map(textOf).join(" ").toLowerCase()]));
    const box = table.closest(".scroll"), line = document.createElement("p"), label = document.createElement("label");
    const input = document.createElement("input"), count = document.createElement("output");
    line.className = "filter";
    input.type = "search";
    input.setAttribute("aria-label", `Filter rows: ${box.getAttribute("aria-label")}`);
    label.append("Filter rows: ", input);
    line.append(label, " ", count);
    box.before(line);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => { row.hidden = !wanted.every((word) => texts.get(row).includes(word)); });
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = wanted.length ? `${shown} of ${rows.length} rows` : "";
    });
  }

  for (const table of document.querySelectorAll("table")) makeFilter(table);
  for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
})();
