"use strict";
const rows = [...document.querySelectorAll("article")];
const input = document.getElementById("number");
let current = 0;

function show(index, scroll = true) {
  if (!Number.isInteger(index) || !rows.length) return;
  rows[current].classList.remove("current");
  current = Math.min(Math.max(index, 0), rows.length - 1);
  rows[current].classList.add("current");
  input.value = current + 1;
  history.replaceState(null, "", "#" + (current + 1));
  if (scroll) window.scrollTo(0, 0);
}

const fromAddress = () => Number((location.hash.match(/^#(\d+)$/) || [0, 1])[1]) - 1;

document.body.classList.add("paged");
document.getElementById("previous").addEventListener("click", () => show(current - 1));
document.getElementById("next").addEventListener("click", () => show(current + 1));
input.addEventListener("change", () => show(Number(input.value) - 1));
window.addEventListener("hashchange", () => show(fromAddress()));
document.addEventListener("keydown", (event) => {
  if (event.target === input || event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = {
    ArrowRight: () => show(current + 1),
    j: () => show(current + 1),
    ArrowLeft: () => show(current - 1),
    k: () => show(current - 1),
    Home: () => show(0),
    End: () => show(rows.length - 1),
    s: () => document.body.classList.toggle("show-source"),
  };
  if (moves[event.key]) {
    event.preventDefault();
    moves[event.key]();
  }
});
show(fromAddress());
