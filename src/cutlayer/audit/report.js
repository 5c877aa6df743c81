"use strict";

// Sorting is all that this page does. Headers become buttons here, so that without script they
// are plain headers and promise nothing.
const status = document.getElementById("sorted");

function compared(a, b) {
  if (a === "" || b === "") return 0;
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
}

function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.sort ?? cell.textContent.trim();
}

function sort(table, heads, column) {
  const head = heads[column];
  const falling = head.getAttribute("aria-sort") === "ascending";
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [keyOf(one, column), keyOf(other, column)];
    if (a === "" || b === "") return (a === "") - (b === ""); // what is not stated stays last
    return falling ? compared(b, a) : compared(a, b);
  });
  table.tBodies[0].append(...rows);
  for (const each of heads) each.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  status.textContent = `Sorted by ${head.textContent}, ${falling ? "descending" : "ascending"}`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(table, heads, column));
  });
}
