"use strict";
for (const formula of document.querySelectorAll(".math")) {
  const tex = formula.textContent;
  const display = tex.startsWith("$$") || tex.startsWith("\\begin");
  const body = tex.startsWith("\\begin") ? tex : tex.replace(/^\$\$?|\$\$?$/g, "");
  katex.render(body, formula, { displayMode: display, throwOnError: false, strict: "ignore" });
}

const contents = document.querySelector(".toc details");
if (contents && matchMedia("(max-width: 76rem)").matches) contents.open = false;
if (contents && "IntersectionObserver" in window) {
  const links = new Map([...contents.querySelectorAll("a")].map((link) => [decodeURIComponent(link.hash.slice(1)), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "0px 0px -75% 0px" });
  for (const id of links.keys()) {
    const heading = document.getElementById(id);
    if (heading) observer.observe(heading);
  }
}

const toggle = document.getElementById("toggle-code");
const code = [...document.querySelectorAll("details.code")];
if (toggle) {
  toggle.hidden = code.length === 0;
  const name = () => { toggle.textContent = code.some((cell) => cell.open) ? "Hide all code" : "Show all code"; };
  toggle.addEventListener("click", () => {
    const open = !code.some((cell) => cell.open);
    code.forEach((cell) => { cell.open = open; });
    name();
  });
  name();
}
