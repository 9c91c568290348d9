"use strict";
(() => {
  // Of a log with very many matches, so many lines are shown: a browser lays them out at once.
  const LINES_MAX = 2000;
  // Of one line, so many matches are marked.
  const MARKS_MAX = 100;
  // How long typing must rest before a search, in milliseconds.
  const REST = 120;

  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  document.documentElement.classList.add("scripted");

  // Opens what an address names.
  const open = () => {
    let id;
    try {
      id = decodeURIComponent(location.hash.slice(1));
    } catch {
      return;
    }
    const target = id ? byId(id) : null;
    const details = target && target.closest("details.target");
    if (!details) return;
    choose(true);
    details.open = true;
    target.scrollIntoView();
    details.querySelector("summary").focus({ preventScroll: true });
  };

  // Which targets are shown, by outcome and by words.
  const filter = byId("ui-filter");
  const boxes = all(".counts input");
  const targets = all("details.target").map((details) => {
    const row = document.querySelector(`tr[data-id="${details.dataset.id}"]`);
    const cells = [...row.cells].slice(0, 3).map((cell) => cell.textContent);
    return { details, row, words: cells.join(" ").toLowerCase(), outcome: row.dataset.outcome };
  });
  const choose = (everything = false) => {
    if (everything) {
      filter.value = "";
      for (const box of boxes) box.checked = true;
    }
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const outcomes = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const target of targets) {
      const fits = outcomes.has(target.outcome) && words.every((word) => target.words.includes(word));
      target.row.hidden = target.details.hidden = !fits;
      if (fits) shown += 1;
    }
    byId("ui-none").hidden = shown > 0;
  };
  filter.addEventListener("input", () => choose());
  for (const box of boxes) box.addEventListener("change", () => choose());
  const openAll = (state) => () => {
    for (const { details } of targets) if (!details.hidden) details.open = state;
  };
  byId("ui-open").addEventListener("click", openAll(true));
  byId("ui-close").addEventListener("click", openAll(false));
  document.addEventListener("keydown", (event) => {
    const field = event.target.closest("input");
    if (event.key === "/" && !field && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "Escape" && field && field.type === "search" && field.value) {
      field.value = "";
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
  });

  // A line with its number and its matches marked.
  const line = (text, number, pattern) => {
    const element = document.createElement("span");
    element.className = "line";
    element.dataset.number = number;
    let end = 0;
    let marks = 0;
    for (const match of text.matchAll(pattern)) {
      if (marks === MARKS_MAX) break;
      marks += 1;
      const mark = document.createElement("mark");
      mark.textContent = match[0];
      element.append(text.slice(end, match.index), mark);
      end = match.index + match[0].length;
    }
    element.append(text.slice(end), "\n");
    return element;
  };

  // The lines of a log that hold what is searched for.
  for (const log of all("details.log")) {
    const field = log.querySelector("input");
    const count = log.querySelector("output");
    const pre = log.querySelector("pre");
    let text = null;
    let timer = 0;
    const search = () => {
      text ??= pre.textContent;
      if (!field.value) {
        pre.textContent = text;
        count.textContent = "";
        return;
      }
      const pattern = new RegExp(field.value.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
      const shown = document.createDocumentFragment();
      let found = 0;
      text.split("\n").forEach((content, index) => {
        pattern.lastIndex = 0;
        if (!pattern.test(content)) return;
        found += 1;
        pattern.lastIndex = 0;
        if (found > LINES_MAX) return;
        shown.append(line(content, index + 1, pattern));
      });
      pre.replaceChildren(shown);
      const cut = found > LINES_MAX ? `, the first ${LINES_MAX} are shown` : "";
      count.textContent = `${found} ${found === 1 ? "line" : "lines"}${cut}`;
    };
    field.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(search, REST);
    });
  }

  // What explains a failure is mostly at the end of a log. A log that cannot be seen yet has no height.
  for (const log of all("details.target.failed details.log, details.target.error details.log")) {
    const pre = log.querySelector("pre");
    let done = false;
    const end = () => {
      if (done || pre.clientHeight === 0) return;
      done = true;
      pre.scrollTop = pre.scrollHeight;
    };
    log.addEventListener("toggle", end);
    log.closest("details.target").addEventListener("toggle", end);
    end();
  }

  addEventListener("hashchange", open);
  open();
})();
