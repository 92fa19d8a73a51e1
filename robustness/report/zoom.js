// Pictures large, stepping along a row and between protectors in place; and nothing folded in print.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
const viewer = document.getElementById("viewer");
if (viewer) {
  let current = null;
  const show = (button) => {
    if (!button) return;
    current = button;
    const small = button.querySelector("img");
    const large = viewer.querySelector("img");
    large.src = small.src;
    large.alt = small.alt;
    viewer.querySelector("figcaption").textContent = small.alt;
  };
  const along = (step) => {
    const row = [...current.closest("tr").querySelectorAll(".zoom")];
    show(row[row.indexOf(current) + step]);
  };
  const across = (step) => {
    const cell = current.closest("td");
    const rows = [...current.closest("tbody").rows];
    const next = rows[rows.indexOf(cell.parentNode) + step];
    show(next && next.cells[cell.cellIndex].querySelector(".zoom"));
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.matches(".zoom")) {
      show(button);
      viewer.showModal();
    } else if (button.dataset.step) along(Number(button.dataset.step));
    else if (button.dataset.row) across(Number(button.dataset.row));
    else if ("close" in button.dataset) viewer.close();
  });
  viewer.addEventListener("keydown", (event) => {
    const moves = {
      ArrowLeft: () => along(-1), ArrowRight: () => along(1),
      ArrowUp: () => across(-1), ArrowDown: () => across(1),
    };
    if (moves[event.key]) {
      event.preventDefault();
      moves[event.key]();
    }
  });
  viewer.addEventListener("close", () => current && current.focus());
}
