"use strict";
// What is copied, and where from, light up together under the pointer and at the keyboard's focus.

function bringIntoView(passage) {
  const mark = passage.querySelector("mark");
  if (mark) passage.scrollTop = mark.offsetTop - passage.clientHeight / 3;
}

function light(event, on) {
  const from = event.target instanceof Element && event.target.closest("[data-runs]");
  if (!from) return;
  const names = from.dataset.runs.split(" ");
  for (const element of from.closest(".chunk").querySelectorAll("[data-runs]")) {
    const shared = element.dataset.runs.split(" ").find((name) => names.includes(name));
    if (!shared) continue;
    element.classList.toggle("linked", on);
    element.classList.toggle(`as${document.getElementById(shared).dataset.color}`, on);
    const passage = element.closest(".passage");
    if (on && passage && !passage.contains(from)) bringIntoView(passage);
  }
}

for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]])
  document.addEventListener(name, (event) => light(event, on));

document.querySelectorAll(".passage").forEach(bringIntoView);
