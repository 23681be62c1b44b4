"use strict";
(() => {
  const { rows, images } = JSON.parse(document.getElementById("predictions").textContent);
  const root = document.querySelector(".browser");
  const find = (selector) => root.querySelector(selector);
  const [select, search, count, list, detail] = ["select", "input", ".count", ".list", ".detail"].map(find);
  const buttons = [...root.querySelectorAll("button[data-verdict]")];
  const PAGE = 200;
  let verdict = "", shown = [], at = 0, drawn = 0;

  const element = (name, style, text) => {
    const made = document.createElement(name);
    if (style) made.className = style;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  for (const name of ["All benchmarks", ...new Set(rows.map((row) => row.bench))]) {
    const option = element("option", "", name);
    option.value = name === "All benchmarks" ? "" : name;
    select.append(option);
  }

  const draw = () => {
    for (const row of shown.slice(drawn, drawn + PAGE)) {
      const line = element("li", row.verdict);
      line.append(element("i", "mark"), element("span", "q", row.question.split("\n")[0]), element("span", "a", row.error ? "error" : row.answer || "(empty)"));
      const place = list.children.length;
      line.addEventListener("click", () => go(place));
      list.append(line);
    }
    drawn = list.children.length;
  };
  const field = (into, name, text, style) => {
    into.append(element("dt", "", name), element("dd", style || "", text));
  };
  const go = (place) => {
    if (!shown.length) { detail.replaceChildren(element("p", "none", "Nothing fits these filters.")); return; }
    at = Math.max(0, Math.min(shown.length - 1, place));
    while (drawn <= at) draw();
    for (const line of list.querySelectorAll("[aria-current]")) line.removeAttribute("aria-current");
    const line = list.children[at];
    line.setAttribute("aria-current", "true");
    if (line.offsetTop < list.scrollTop) list.scrollTop = line.offsetTop;
    const over = line.offsetTop + line.offsetHeight - list.clientHeight;
    if (over > list.scrollTop) list.scrollTop = over;
    const row = shown[at];
    const picture = element("div", "picture");
    if (row.image === null) picture.append(element("span", "", "no image in this page"));
    else { const image = element("img"); image.src = images[row.image]; image.alt = ""; picture.append(image); }
    const words = element("dl");
    field(words, row.bench + (row.category ? ", " + row.category : ""), row.question, "question");
    if (row.error) field(words, "Error", row.error, "error");
    else {
      field(words, "Answer", row.answer || "(empty)", row.verdict);
      if (row.read !== row.answer) field(words, "Read as", row.read === null ? "nothing: unparsed" : row.read);
    }
    if (row.truth !== "") field(words, "Truth", row.truth);
    field(words, "Verdict", row.verdict + (row.score === null ? "" : ", score " + Math.round(row.score * 1000) / 1000));
    field(words, "Item", row.id, "id");
    detail.replaceChildren(picture, words);
  };
  const fits = (row) => {
    const text = search.value.trim().toLowerCase();
    return (!select.value || row.bench === select.value) &&
      (!text || [row.question, row.answer, row.truth, row.id, row.category].some((part) => part.toLowerCase().includes(text)));
  };
  const filter = () => {
    const fitting = rows.filter(fits);
    shown = fitting.filter((row) => !verdict || row.verdict === verdict);
    for (const button of buttons) {
      const name = button.dataset.verdict;
      button.setAttribute("aria-pressed", String(name === verdict));
      button.querySelector("b").textContent = (name ? fitting.filter((row) => row.verdict === name) : fitting).length;
    }
    count.textContent = shown.length + " of " + rows.length;
    list.replaceChildren();
    drawn = 0; list.scrollTop = 0;
    draw();
    go(0);
  };
  list.addEventListener("scroll", () => {
    if (drawn < shown.length && list.scrollTop + list.clientHeight > list.scrollHeight - 200) draw();
  });
  select.addEventListener("change", filter);
  search.addEventListener("input", filter);
  for (const button of buttons) button.addEventListener("click", () => { verdict = button.dataset.verdict; filter(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search || event.target === select) { if (event.key === "Escape") event.target.blur(); return; }
    const step = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    const arrow = event.key.startsWith("Arrow");
    if (step && (!arrow || document.activeElement === list)) { go(at + step); event.preventDefault(); }
    else if (event.key === "/") { search.focus(); event.preventDefault(); }
    else if (/^[1-5]$/.test(event.key)) { verdict = buttons[event.key - 1].dataset.verdict; filter(); }
  });
  filter();
})();
