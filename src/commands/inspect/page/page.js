"use strict";
// Draws the conversations. Whatever comes from the data is set as text, never as markup.
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  theme();
  const app = $("app");
  app.hidden = false;
  let data;
  try {
    data = await unpacked($("payload").textContent.trim());
  } catch (error) {
    app.append(make("p", "none", "This browser cannot unpack the conversations (it knows no DecompressionStream): " + error));
    return;
  }

  // ---- the data -------------------------------------------------------------------------------------------------

  const UNIT = 10000;
  const texts = data.texts.map((text) => (typeof text === "string" ? [text] : text));
  const plain = texts.map((parts) => parts.filter((_, i) => i % 2 === 0).join(""));
  const known = (p) => (p === null || p === undefined ? null : p >= 0 ? { p: p / UNIT, about: false } : { p: (-1 - p) / UNIT, about: true });
  // Token j's entry is what was expected there: the distribution after token j - 1.
  const rows = data.rows.map((row) => {
    const entry = new Int32Array(row.text.length).fill(-1);
    const starts = new Int32Array(row.next.length);
    for (let i = 0, n = 0; i < row.runs.length; i += 2)
      for (let at = row.runs[i]; at < row.runs[i] + row.runs[i + 1]; at++) entry[at + 1] = n++;
    for (let n = 0, at = 0; n < starts.length; n++) {
      starts[n] = at;
      at += 1 + 2 * row.kept[at];
    }
    return { ...row, entry, starts };
  });
  const expected = (row, j) => {
    const n = row.entry[j];
    if (n === undefined || n < 0) return null;
    const choices = [];
    for (let i = 0, at = row.starts[n] + 1; i < row.kept[row.starts[n]]; i++, at += 2)
      choices.push({ text: row.kept[at], ...known(row.kept[at + 1]) });
    return { came: known(row.next[n]), rank: row.rank[n], nats: row.nats[n] === null ? null : row.nats[n] / 100, tail: row.tail[n] / UNIT, choices };
  };
  const first = (row, n) => (row.kept[row.starts[n]] > 0 ? known(row.kept[row.starts[n] + 2]).p : 0);
  const HEATS = {
    hot: (row, n) => {
      const came = known(row.next[n]);
      return came === null || came.p <= 0 ? 1 : Math.min(1, -Math.log10(came.p) / 3);
    },
    unsure: (row, n) => Math.min(1, (row.nats[n] || 0) / 500),
    missed: (row, n) => (row.rank[n] === 1 ? 0 : first(row, n)),
  };
  const MODES = [
    ["hot", "Surprise", "expected", "one in a thousand, or not kept"],
    ["unsure", "Uncertainty", "entropy 0", "5 nats and more"],
    ["missed", "Missed", "its first choice came", "it was sure of another"],
  ];
  // What was scored first; dots stand for what was not between.
  const opening = (row) => {
    const said = [];
    for (let j = 0; j < row.text.length && said.length < 60; j++)
      if (row.entry[j] >= 0) said.push((said.length && row.entry[j - 1] < 0 ? " … " : "") + plain[row.text[j]]);
    return said.join("").replace(/\s+/g, " ").trim();
  };
  const searchable = new Map();
  const wholeText = (row) => {
    if (!searchable.has(row)) searchable.set(row, row.text.map((t) => plain[t]).join("").toLowerCase());
    return searchable.get(row);
  };

  // ---- the frame ------------------------------------------------------------------------------------------------

  const search = make("input");
  Object.assign(search, { type: "search", placeholder: "Find a text, or a row by its number  ( / )" });
  search.setAttribute("aria-label", "Find a text, or a row by its number");
  const order = make("select");
  order.setAttribute("aria-label", "Order of the conversations");
  const ORDERS = [
    ["By row", (a, b) => a.row - b.row],
    ["Most surprising first", (a, b) => b.perplexity - a.perplexity || a.row - b.row],
    ["Least surprising first", (a, b) => a.perplexity - b.perplexity || a.row - b.row],
    ["Longest first", (a, b) => b.text.length - a.text.length || a.row - b.row],
  ];
  ORDERS.forEach(([name], i) => order.append(Object.assign(make("option", "", name), { value: i })));
  const modes = make("div", "modes");
  modes.setAttribute("role", "radiogroup");
  modes.setAttribute("aria-label", "What colours tell");
  const modeButtons = MODES.map(([mode, name]) => {
    const button = Object.assign(make("button", "", name), { type: "button" });
    button.setAttribute("role", "radio");
    button.dataset.mode = mode;
    button.disabled = mode !== "hot" && !rows.some((row) => row.nats.some((nats) => nats !== null));
    button.addEventListener("click", () => setMode(mode));
    return button;
  });
  modes.append(...modeButtons);
  const toolbar = make("div", "toolbar");
  toolbar.append(search, order, modes);

  const list = make("nav", "list");
  list.setAttribute("aria-label", "Conversations");
  const article = make("article");
  const about = make("div", "about");
  const legend = make("div", "legend");
  const text = make("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "The conversation's tokens; arrow keys go from token to token");
  article.append(about, legend, text);
  const panel = make("aside", "idle");
  panel.setAttribute("aria-live", "polite");
  panel.setAttribute("aria-label", "What the teacher expected");
  const reader = make("div", "reader");
  reader.append(list, article, panel);
  app.append(toolbar, reader);

  // ---- state ----------------------------------------------------------------------------------------------------

  const entries = new Map();
  let mode = "hot", shown = [], row = null, spans = [], chosen = -1, pinned = false;

  function setMode(wanted) {
    mode = wanted;
    app.dataset.mode = mode;
    modeButtons.forEach((button) => button.setAttribute("aria-checked", button.dataset.mode === mode));
    const [, , least, most] = MODES.find(([name]) => name === mode);
    legend.replaceChildren(make("span", "", least), make("i"), make("span", "", most));
    heat();
  }

  function heat() {
    spans.forEach((span, j) => {
      const n = row.entry[j];
      if (n >= 0) span.style.setProperty("--h", HEATS[mode](row, n).toFixed(3));
    });
  }

  function refill() {
    const wanted = search.value.trim().toLowerCase();
    shown = rows.filter((row) => !wanted || String(row.row) === wanted || wholeText(row).includes(wanted)).sort(ORDERS[order.value][1]);
    list.replaceChildren(...shown.map((row) => entries.get(row) ?? listed(row)));
    if (!shown.length) list.append(make("p", "none", "No conversation here contains that."));
    markCurrent();
  }

  // The entry of a conversation, made when it is first shown and kept for every later search.
  function listed(one) {
    const button = Object.assign(make("button"), { type: "button" });
    const top = make("span", "top");
    top.append(make("span", "", `row ${one.row}`), make("span", "", one.perplexity === null ? `${one.text.length} tokens` : `perplexity ${number(one.perplexity)}`));
    const strip = make("span", "strip");
    strip.style.backgroundImage = gradient(one);
    button.append(top, make("span", "begins", opening(one) || "(nothing was scored)"), strip);
    button.dataset.row = one.row;
    button.addEventListener("click", () => open(one));
    entries.set(one, button);
    return button;
  }

  // How surprising the conversation is from its beginning to its end.
  function gradient(one) {
    const pieces = 40, stops = [];
    for (let i = 0; i < pieces; i++) {
      const [from, to] = [i, i + 1].map((at) => Math.floor((at * one.text.length) / pieces));
      let sum = 0, count = 0;
      for (let j = from; j < Math.max(to, from + 1); j++)
        if (one.entry[j] >= 0) [sum, count] = [sum + HEATS.hot(one, one.entry[j]), count + 1];
      const colour = count ? `rgb(var(--hot) / ${(sum / count).toFixed(2)})` : "transparent";
      stops.push(`${colour} ${(100 * i) / pieces}% ${(100 * (i + 1)) / pieces}%`);
    }
    return `linear-gradient(90deg, ${stops.join(", ")})`;
  }

  function markCurrent() {
    for (const button of list.querySelectorAll("button")) {
      const current = row !== null && Number(button.dataset.row) === row.row;
      button.setAttribute("aria-current", current);
      if (current) {
        const [box, at] = [list.getBoundingClientRect(), button.getBoundingClientRect()];
        if (at.top < box.top || at.bottom > box.bottom) list.scrollTop += at.top - box.top - box.height / 3;
      }
    }
  }

  function open(wanted, token) {
    row = wanted;
    [chosen, pinned] = [-1, false];
    const place = shown.indexOf(row);
    const title = make("div");
    title.append(make("h3", "", `Row ${row.row}`));
    const scored = row.next.length;
    const facts = [`conversation ${row.seq} of the data`, `${row.text.length} tokens, ${scored} scored`];
    if (row.perplexity !== null) facts.push(`perplexity ${number(row.perplexity)}`, `first choice came at ${percent(row.came)}`);
    title.append(make("p", "", facts.join(" · ")));
    const steps = make("div", "steps");
    steps.append(step("‹", "Previous conversation (p)", () => go(-1), place <= 0), step("›", "Next conversation (n)", () => go(1), place < 0 || place + 1 >= shown.length));
    about.replaceChildren(title, steps);
    spans = row.text.map((t, j) => token_span(t, j));
    matches();
    text.replaceChildren(...spans);
    heat();
    markCurrent();
    if (token === undefined) rest();
    else choose(token, true, true);
    remember();
  }

  function step(sign, name, act, off) {
    const button = Object.assign(make("button", "", sign), { type: "button", title: name, disabled: Boolean(off) });
    button.setAttribute("aria-label", name);
    button.addEventListener("click", act);
    return button;
  }

  function go(by) {
    const place = shown.indexOf(row) + by;
    if (shown[place]) open(shown[place]);
  }

  function token_span(t, j) {
    const span = make("span", row.entry[j] < 0 ? "t u" : row.next[row.entry[j]] === null ? "t k" : "t");
    span.dataset.j = j;
    texts[t].forEach((part, i) => {
      if (i % 2) {
        // Bytes of a character that is split over tokens would stand in the way of reading.
        span.append(part.startsWith("\\x") ? make("span", "dot", "·") : make("span", "esc", part));
      } else {
        part.split("\n").forEach((line, k) => {
          if (k) span.append(make("i", "br", "⏎"), "\n");
          if (line) span.append(line);
        });
      }
    });
    return span;
  }

  // Marks the tokens in which what is looked for stands.
  function matches() {
    const wanted = search.value.trim().toLowerCase();
    if (!wanted || String(row.row) === wanted) return;
    const whole = wholeText(row);
    const ends = [];
    row.text.reduce((end, t, j) => (ends[j] = end + plain[t].toLowerCase().length), 0);
    for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + wanted.length))
      for (let j = ends.findIndex((end) => end > at); j >= 0 && j < ends.length && ends[j] - plain[row.text[j]].length < at + wanted.length; j++)
        spans[j].classList.add("m");
  }

  // ---- one position ---------------------------------------------------------------------------------------------

  function choose(j, pin, scroll) {
    if (j < 0 || j >= spans.length) return;
    spans[chosen]?.classList.remove("on");
    [chosen, pinned] = [j, pin];
    spans[j].classList.add("on");
    draw(j);
    if (scroll) reveal(spans[j]);
    if (pin) remember();
  }

  function reveal(span) {
    const box = span.getBoundingClientRect();
    const sheet = getComputedStyle(panel).position === "fixed" ? panel.getBoundingClientRect().height : 0;
    const bottom = window.innerHeight - sheet;
    if (box.top < 40 || box.bottom > bottom - 20) window.scrollBy({ top: box.top - bottom / 2, behavior: "instant" });
  }

  function rest() {
    panel.className = "idle";
    document.body.classList.remove("sheet");
    const keys = make("p", "keys");
    for (const [names, what] of [[["←", "→"], "token by token"], [["↑", "↓"], "line by line"], [["s"], "next surprise"], [["n", "p"], "next, previous conversation"], [["/"], "find"], [["Esc"], "let go"]]) {
      names.forEach((name) => keys.append(make("kbd", "", name), " "));
      keys.append(what, make("br"));
    }
    panel.replaceChildren(make("h3", "", "Point at a token, or tap it, to see what the teacher expected there."), keys);
  }

  function draw(j) {
    const at = expected(row, j);
    panel.className = pinned ? "pinned" : "";
    document.body.classList.add("sheet");
    const steps = make("div", "steps");
    steps.append(step("‹", "Previous token", () => choose(chosen - 1, true, true), j === 0), step("›", "Next token", () => choose(chosen + 1, true, true), j + 1 === spans.length), step("✕", "Close", letGo));
    const came = make("p", "came");
    came.append(piece(row.text[j]));
    panel.replaceChildren(steps, make("h3", "", `Token ${j}`), came);
    if (!at) {
      panel.append(make("h3", "", "Not scored: nothing was learned from this token, and nothing was kept of what the teacher expected here."));
      return;
    }
    const choices = make("ol", "choices");
    const placed = at.rank && at.rank <= at.choices.length ? at.rank - 1 : -1;
    const among = at.rank ? placed : at.choices.findIndex((choice) => choice.text === row.text[j]);
    at.choices.forEach((choice, i) => choices.append(listedChoice(piece(choice.text), choice, i === among ? "it" : "")));
    if (among < 0 && at.came) choices.append(listedChoice(piece(row.text[j]), at.came, "it"));
    const others = Math.max(0, 1 - at.choices.reduce((sum, choice) => sum + choice.p, 0) - (among < 0 && at.came ? at.came.p : 0));
    choices.append(listedChoice(make("span", "", "all others"), { p: others, about: true }, "rest"));
    const numbers = make("dl", "numbers");
    const say = (name, value) => numbers.append(make("dt", "", name), make("dd", "", value));
    say("its probability", at.came ? chance(at.came) : at.nats === null ? "not drawn" : "not kept");
    if (at.rank) say("its place", String(at.rank));
    if (at.came && at.came.p > 0) say("surprise", `${(-Math.log(at.came.p)).toFixed(2)} nats`);
    if (at.nats !== null) say("entropy, at least", `${at.nats.toFixed(2)} nats`);
    if (at.nats !== null) say("kept in the cache", percent(1 - at.tail));
    say("outside of what was kept", percent(at.tail));
    panel.append(make("h3", "", "The teacher expected"), choices, numbers);
  }

  function listedChoice(name, choice, kind) {
    const item = make("li", kind);
    item.style.setProperty("--p", Math.min(1, choice.p).toFixed(4));
    const label = make("span");
    label.append(name);
    item.append(label, make("span", "number", chance(choice)));
    return item;
  }

  // A token alone: spaces and line breaks are drawn.
  function piece(t) {
    const out = make("span", "piece");
    if (texts[t].every((part) => part === "")) out.append(make("span", "esc", "empty"));
    texts[t].forEach((part, i) => {
      if (i % 2) out.append(make("span", "esc", part));
      else
        for (const run of part.split(/([ \n]+)/)) {
          if (/^[ \n]+$/.test(run)) out.append(make("span", "space", run.replaceAll(" ", "␣").replaceAll("\n", "⏎")));
          else if (run) out.append(run);
        }
    });
    return out;
  }

  function letGo() {
    spans[chosen]?.classList.remove("on");
    [chosen, pinned] = [-1, false];
    rest();
    remember();
  }

  // ---- moving about ---------------------------------------------------------------------------------------------

  const tokenOf = (event) => {
    const span = event.target instanceof Element ? event.target.closest(".t") : null;
    return span ? Number(span.dataset.j) : -1;
  };
  const hovers = window.matchMedia("(hover: hover)");
  text.addEventListener("pointerover", (event) => {
    const j = tokenOf(event);
    if (j >= 0 && !pinned && hovers.matches && event.pointerType !== "touch") choose(j, false, false);
  });
  text.addEventListener("click", (event) => {
    const j = tokenOf(event);
    if (j < 0) return;
    if (j === chosen && pinned) letGo();
    else choose(j, true, false);
  });

  // The token above or below, nearest to where this one is.
  function vertically(by) {
    const here = spans[chosen].getBoundingClientRect();
    const [middle, height] = [here.left + here.width / 2, here.height || 20];
    let [best, far, line] = [-1, Infinity, null];
    for (let j = chosen + by; j >= 0 && j < spans.length; j += by) {
      const box = spans[j].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < height / 2) continue;
      if (line === null) line = box.top;
      else if (Math.abs(box.top - line) > height / 2) break;
      const off = Math.abs(box.left + box.width / 2 - middle);
      if (off < far) [best, far] = [j, off];
    }
    return best;
  }

  function nextSurprise() {
    for (let j = Math.max(0, chosen) + 1; j < spans.length; j++)
      if (row.entry[j] >= 0 && HEATS.hot(row, row.entry[j]) >= 2 / 3) return j;
    return -1;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target instanceof Element && event.target.closest("input, select");
    if (event.key === "Escape") {
      if (field) field.blur();
      letGo();
      return;
    }
    if (field) return;
    const start = () => Math.max(0, row.entry.findIndex((n) => n >= 0));
    const moves = {
      ArrowRight: () => choose(chosen < 0 ? start() : chosen + 1, true, true),
      ArrowLeft: () => choose(chosen < 0 ? start() : chosen - 1, true, true),
      ArrowDown: () => chosen >= 0 && choose(vertically(1), true, true),
      ArrowUp: () => chosen >= 0 && choose(vertically(-1), true, true),
      s: () => choose(nextSurprise(), true, true),
      n: () => go(1),
      p: () => go(-1),
      "/": () => search.focus(),
    };
    const vertical = event.key === "ArrowDown" || event.key === "ArrowUp";
    // Without a token in hand the arrows scroll, as everywhere.
    if (!row || !Object.hasOwn(moves, event.key) || (vertical && chosen < 0)) return;
    event.preventDefault();
    moves[event.key]();
  });

  function remember() {
    const place = chosen >= 0 && pinned ? `#${row.row}.${chosen}` : `#${row.row}`;
    try {
      history.replaceState(null, "", place);
    } catch {
      // A page without an address of its own cannot remember places.
    }
  }

  function recall() {
    const [, wanted, token] = /^#(\d+)(?:\.(\d+))?$/.exec(location.hash) || [];
    const found = rows.find((one) => String(one.row) === wanted);
    if (!found) return false;
    open(found, token === undefined || Number(token) >= found.text.length ? undefined : Number(token));
    return true;
  }

  // ---- numbers --------------------------------------------------------------------------------------------------

  function number(x) {
    return x >= 1e6 ? x.toExponential(1) : x >= 100 ? x.toFixed(0) : x.toFixed(2);
  }
  function percent(p) {
    return p > 0 && p < 0.0001 ? "<0.01%" : `${(100 * p).toFixed(p >= 0.0995 ? 1 : 2)}%`;
  }
  function chance({ p, about }) {
    return p <= 0 ? "<0.01%" : (about ? "~" : "") + percent(p);
  }

  search.addEventListener("input", () => {
    refill();
    if (row) open(row);
  });
  order.addEventListener("change", refill);
  window.addEventListener("hashchange", recall);
  setMode("hot");
  refill();
  if (!recall() && rows.length) open([...rows].sort(ORDERS[0][1])[0]);
  document.documentElement.dataset.ready = "true";

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function theme() {
    const root = document.documentElement;
    const remembered = (() => {
      try {
        return localStorage.getItem("potstill-theme");
      } catch {
        return null;
      }
    })();
    if (remembered) root.dataset.theme = remembered;
    $("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try {
        localStorage.setItem("potstill-theme", root.dataset.theme);
      } catch {
        // It is light or dark until the page is closed.
      }
    });
  }
})();
