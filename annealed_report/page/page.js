"use strict";
const select = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
const kept = { // choices that hold on all pages; some browsers keep none for files
  get: (name) => { try { return localStorage.getItem(`annealed-${name}`); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(`annealed-${name}`, value); } catch { /* then for this page alone */ } },
};

// formulas
for (const formula of select(".math")) {
  const tex = formula.textContent;
  const display = tex.startsWith("$$") || tex.startsWith("\\begin");
  const body = tex.startsWith("\\begin") ? tex : tex.replace(/^\$\$?|\$\$?$/g, "");
  katex.render(body, formula, { displayMode: display, throwOnError: false, strict: "ignore" });
}

// light and dark
const theme = document.getElementById("toggle-theme");
const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const paint = (chosen) => {
  if (chosen) document.documentElement.dataset.theme = chosen;
  theme.textContent = dark() ? "Light" : "Dark";
};
paint(kept.get("theme"));
theme.addEventListener("click", () => { const next = dark() ? "light" : "dark"; kept.set("theme", next); paint(next); });

// code
const toggle = document.getElementById("toggle-code");
const code = select("details.code");
const unfold = (open, first = false) => {
  code.forEach((cell) => { cell.open = open || (first && "shown" in cell.dataset); });
  toggle.textContent = open ? "Hide code" : "Show code";
};
toggle.hidden = code.length === 0;
let shown = kept.get("code") === "shown";
unfold(shown, true);
toggle.addEventListener("click", () => { shown = !shown; kept.set("code", shown ? "shown" : "hidden"); unfold(shown); });
for (const block of select("details.code .highlight")) {
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    const text = block.querySelector("pre").textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch {
      getSelection().selectAllChildren(block.querySelector("pre"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}

// contents
const contents = document.querySelector(".toc details");
if (contents && matchMedia("(max-width: 76rem)").matches) contents.open = false;
if (contents && "IntersectionObserver" in window) {
  const links = new Map(select("a", contents).map((link) => [decodeURIComponent(link.hash.slice(1)), link]));
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
const menu = document.querySelector(".menu details");
document.addEventListener("click", (event) => { if (!menu.contains(event.target)) menu.open = false; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") menu.open = false; });

// what a citation cites, beside it; and the way back from the list of references
for (const entry of select(".references li")) {
  const cited = select(`cite a[href="#${CSS.escape(entry.id)}"]`);
  cited.forEach((link, number) => {
    link.id = `cited-${entry.id}-${number + 1}`;
    link.title = entry.textContent.trim();
  });
  if (cited.length) entry.append(" ", ...cited.map((link, number) => make("a", {
    href: `#${link.id}`, className: "back", textContent: "↩", ariaLabel: `back to citation ${number + 1}`,
  })));
}

// what a word of the field means, on hover, by keyboard and at a tap
const meaning = make("span", { className: "meaning", hidden: true, role: "tooltip" });
document.body.append(meaning);
for (const word of select("abbr[data-meaning]")) {
  word.setAttribute("aria-description", word.dataset.meaning);
  const say = () => {
    meaning.textContent = word.dataset.meaning;
    meaning.hidden = false;
    const at = word.getBoundingClientRect(), room = document.documentElement.clientWidth - meaning.offsetWidth - 8;
    meaning.style.left = `${Math.max(8, Math.min(at.left, room)) + scrollX}px`;
    meaning.style.top = `${at.bottom + 6 + scrollY}px`;
  };
  const hush = () => { meaning.hidden = true; };
  for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, say);
  for (const event of ["mouseleave", "blur"]) word.addEventListener(event, hush);
}

// figures in their full size
const enlarged = make("dialog", { className: "enlarged", ariaLabel: "The figure enlarged" });
document.body.append(enlarged);
enlarged.addEventListener("click", () => enlarged.close());
for (const image of select("figure.figure > img")) {
  const button = make("button", { type: "button", className: "enlarge", ariaLabel: "Enlarge the figure" });
  const measure = () => button.classList.toggle("wide", image.naturalWidth > 640); // swiped on a phone, so that it can be read
  if (image.complete) measure();
  image.addEventListener("load", measure);
  const frame = make("div", { className: "scroll" });
  image.replaceWith(frame);
  frame.append(button);
  button.append(image);
  button.addEventListener("click", () => {
    enlarged.replaceChildren(make("img", { src: image.src, alt: image.alt }));
    enlarged.showModal();
  });
}

// tables: what scrolls says so; the table of claims can be filtered and kept
for (const frame of select(".scroll, .katex-display, pre")) {
  if (frame.scrollWidth > frame.clientWidth + 1 && !frame.querySelector(".scroll")) frame.tabIndex = 0;
}
for (const table of select("table")) {
  const names = select("thead th", table).map((cell) => cell.textContent.trim());
  const long = select("tbody td", table).some((cell) => cell.textContent.length > 60);
  if (names.length > 2 && long) table.classList.add("cards"); // on a phone each row is one
  for (const row of select("tbody tr", table)) [...row.cells].forEach((cell, number) => { cell.dataset.label = names[number] || ""; });
}
for (const part of select("details.claims")) {
  const table = part.querySelector("table");
  if (!table) continue;
  const rows = select("tbody tr", table), count = make("span", { ariaLive: "polite" });
  const filter = make("input", { type: "search", placeholder: "Filter the claims", ariaLabel: "Filter the claims" });
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  const quoted = (cell) => `"${cell.textContent.trim().replaceAll('"', '""')}"`;
  const csv = select("tr", table).map((row) => [...row.cells].map(quoted).join(",")).join("\r\n");
  const link = make("a", { href: `data:text/csv;charset=utf-8,${encodeURIComponent(csv)}`, download: "claims.csv", textContent: "download as CSV" });
  filter.addEventListener("input", show);
  part.querySelector("summary").after(make("p", { className: "filter" }, filter, " ", count, " ", link));
  show();
}

// search over all pages, on the index
const data = document.getElementById("sections");
if (data) {
  const sections = JSON.parse(data.textContent), results = document.getElementById("search-results");
  const field = document.querySelector(".bar input[type=search]");
  const find = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    results.hidden = words.length === 0;
    if (!words.length) return;
    const weight = (section) => words.filter((word) => `${section.title} ${section.heading}`.toLowerCase().includes(word)).length;
    const found = sections
      .filter((section) => words.every((word) => `${section.title} ${section.heading} ${section.text}`.toLowerCase().includes(word)))
      .sort((a, b) => weight(b) - weight(a));
    results.replaceChildren(
      make("h2", { textContent: found.length ? `${found.length} ${found.length === 1 ? "section" : "sections"} with “${field.value}”` : `Nothing has “${field.value}”` }),
      ...found.slice(0, 30).map((section) => {
        const at = Math.max(0, section.text.toLowerCase().indexOf(words[0]) - 60);
        return make("p", {},
          make("a", { href: `${section.page}.html${section.anchor ? `#${encodeURIComponent(section.anchor)}` : ""}`, textContent: section.heading || section.title }),
          make("span", { textContent: section.heading ? ` in ${section.title}` : "" }), make("br"),
          `${at ? "…" : ""}${section.text.slice(at, at + 180)}…`);
      }));
  };
  field.form.addEventListener("submit", (event) => { event.preventDefault(); find(); });
  field.addEventListener("input", find);
  field.value = new URLSearchParams(location.search).get("q") || "";
  find();
}
