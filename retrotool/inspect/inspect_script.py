"""How the page of ``inspect`` looks, and what its search box does: a style, the box, and a script, as text.

The script knows the page's elements alone, so it is the same for every page. Its comments say what it does.
"""

from __future__ import annotations

STYLE = """
body { max-width: 92rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.25rem; margin: 0 0 1rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.overview { max-width: 46rem; } .overview summary { color: var(--soft); cursor: pointer; }
mark { background: var(--run); color: inherit; border-radius: 0.15em; box-shadow: 0 0.12em 0 var(--runline); }
mark.lit { background: var(--runline); color: var(--page); }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 0.5rem 0.75rem; align-items: center;
  margin: 1rem -1rem 1.5rem; padding: 0.6rem 1rem; background: var(--page); border-bottom: 1px solid var(--line); }
[hidden] { display: none !important; }
.tools input[type=search] { flex: 1 1 15rem; } .tools select { max-width: 11rem; }
.tools input[type=search], .tools select { font: inherit; font-size: 0.9rem; padding: 0.3rem 0.5rem; color: var(--ink);
  background: var(--box); border: 1px solid var(--line); border-radius: 0.3rem; }
.tools label, .tools output { font-size: 0.9rem; color: var(--soft); white-space: nowrap; }
.tools output { margin-left: auto; font-variant-numeric: tabular-nums; }
article { content-visibility: auto; contain-intrinsic-size: auto 40rem; margin: 0 0 1.5rem; padding: 0.9rem 1.1rem;
  border: 1px solid var(--line); border-radius: 0.5rem; scroll-margin-top: 5rem; display: grid;
  grid-template-columns: minmax(0, 5fr) minmax(0, 8fr); gap: 0.75rem 2rem; align-items: start; }
article:target { border-color: var(--bar); }
article h2 { margin: 0 0 0.2rem; font-size: 1rem; line-height: 1.4; }
article h2 a { color: inherit; text-decoration: none; }
article h2 a:hover { text-decoration: underline; }
.from { margin: 0; font-size: 0.83rem; line-height: 1.4; overflow-wrap: anywhere; color: var(--soft); }
.whole { white-space: nowrap; } .from b { color: var(--ink); font-weight: 600; }
.chunk { position: sticky; top: 4.5rem; }
.text { margin-top: 0.4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.near { margin: 0; padding: 0; list-style: none; }
.near > li { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: 0 1rem; padding: 0 0 0.7rem;
  color: inherit; }
.near > li:not([hidden]) ~ li { padding-top: 0.7rem; border-top: 1px solid var(--line); }
.near > li.lit .rank { background: var(--runline); color: var(--page); }
.measures { font-size: 0.83rem; line-height: 1.4; color: var(--soft); font-variant-numeric: tabular-nums; }
.rank { display: inline-block; min-width: 1.4em; margin-right: 0.5em; border-radius: 0.3em; text-align: center;
  font-weight: 600; color: var(--ink); background: var(--box); }
.distance { display: block; margin: 0.3rem 0; padding-bottom: 7px; background:
  linear-gradient(var(--bar), var(--bar)) 0 100% / calc(var(--d) / var(--far) * 100%) 4px no-repeat,
  linear-gradient(var(--line), var(--line)) 0 100% / 100% 4px no-repeat; }
.measures b { color: var(--ink); font-weight: 600; } .measures span { display: block; }
.measures .rank { display: inline-block; }
details.next { margin-top: 0.4rem; } details.next summary { font-size: 0.83rem; color: var(--soft); cursor: pointer; }
details.next .text { margin-top: 0.2rem; padding-left: 0.9rem; border-left: 2px solid var(--line); }
.none { color: var(--soft); font-style: italic; }
::highlight(hit) { background: var(--hit); color: var(--hitink); }
:root { --run: #ffe9a8; --runline: #b07d00; --box: #f3f5f7; --hit: #2f6fab; --hitink: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --run: #57480f; --runline: #e0b23c; --box: #22262d; --hit: #8cc4f5; --hitink: #10151b; }
}
@media (max-width: 60rem) { article { grid-template-columns: minmax(0, 1fr); } .chunk { position: static; } }
@media (max-width: 34rem) { .near > li { grid-template-columns: minmax(0, 1fr); } .distance { max-width: 8rem; }
  .tools { position: static; } }
@media print { .tools { display: none; } article { break-inside: avoid; content-visibility: visible; } }
"""

TOOLS = """\
<form class="tools" id="tools" role="search" hidden="">
<input type="search" id="words" placeholder="Words to find ( / )"
  aria-label="Words in a chunk or a neighbour" autocomplete="off"/>
<label>chunks <select id="source"><option value="">of every source</option></select></label>
<label>neighbours <select id="from"><option value="">of every source</option></select></label>
<label>in <select id="database"><option value="">every database</option></select></label>
<label>with <select id="run">RUNS</select></label>
<label><input type="checkbox" id="opened"/> continuations</label>
<output id="told" for="words source from database run"></output>
</form>
<p class="none" id="nothing" hidden="">Nothing has all of this.</p>
"""
"""RUNS are the choices of a run in common. The script fills in the others, and shows all of it."""

SCRIPT = """
"use strict";
const part = id => document.getElementById(id);
const [tools, words, told, opened, nothing] = ["tools", "words", "told", "opened", "nothing"].map(part);
const choices = ["source", "from", "database", "run"].map(part);
const [source, from, database, run] = choices;

// What is searched is kept in small letters, once it is asked for.
class Item {
  constructor(element, words) { this.element = element; this.places = words; }
  has(wanted) {
    if (this.text === undefined) this.text = this.places.map(place => place.textContent).join(" ").toLowerCase();
    return wanted.every(word => this.text.includes(word));
  }
}

const chunks = [...document.querySelectorAll("article")].map(element => {
  const chunk = new Item(element, [...element.querySelectorAll(".chunk")]);
  chunk.source = element.dataset.source;
  chunk.near = [...element.querySelectorAll(".near > li")].map(line => {
    const near = new Item(line, [line]);
    near.from = line.dataset.source;
    near.database = line.dataset.database;
    near.run = Number(line.dataset.run);
    near.next = line.querySelector("details");
    return near;
  });
  return chunk;
});
const all = chunks.flatMap(chunk => chunk.near);

// Most frequent first; a choice that is none is not shown.
function offer(select, values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const ordered = [...counts].sort((one, other) => other[1] - one[1] || (one[0] < other[0] ? -1 : 1));
  for (const [value, n] of ordered) {
    const option = new Option(`${value || "(none)"} (${n.toLocaleString("en")})`, "=" + value);
    select.add(option);
  }
  select.parentElement.hidden = counts.size < 2;
}

// Words are looked for in a chunk, and in each neighbour with its continuation. A chunk that has them all keeps its
// neighbours; of another one those are left that have them all, and it goes if there is none.
function show() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(word => word);
  const least = Number(run.value);
  const strict = least > 0 || from.value !== "" || database.value !== "";
  let shown = 0, neighbours = 0;
  for (const chunk of chunks) {
    const here = !source.value || source.value === "=" + chunk.source;
    const own = here && chunk.has(wanted);
    let left = 0;
    for (const near of chunk.near) {
      const fits = here && near.run >= least && (!from.value || from.value === "=" + near.from) &&
        (!database.value || database.value === "=" + near.database);
      const stays = fits && (own || near.has(wanted));
      near.element.hidden = !stays;
      if (stays) left += 1;
    }
    const stays = left > 0 || (own && !strict);
    chunk.element.hidden = !stays;
    if (stays) shown += 1;
    neighbours += left;
  }
  const of = (n, most, what) => (n === most ? "" : n.toLocaleString("en") + " of ") + most.toLocaleString("en") + what;
  told.value = of(shown, chunks.length, " chunks") + ", " + of(neighbours, all.length, " neighbours");
  nothing.hidden = shown > 0;
  reveal(wanted);
  paint(wanted);
}

// A continuation that has one of the words is opened, and closed when it has none of them any more.
function reveal(wanted) {
  for (const near of all) {
    const next = near.next;
    if (!next || (near.element.hidden && !next.dataset.found)) continue;
    const text = wanted.length ? next.textContent.toLowerCase() : "";
    const found = !near.element.hidden && wanted.some(word => text.includes(word));
    if (found && !next.open) { next.open = true; next.dataset.found = "1"; }
    if (!found && next.dataset.found) { next.open = opened.checked; delete next.dataset.found; }
  }
}

// The words found are painted over, without a change of the page, where the browser can do that.
function paint(wanted) {
  if (!window.CSS || !CSS.highlights) return;
  CSS.highlights.delete("hit");
  const ranges = [];
  for (const chunk of wanted.length ? chunks : []) {
    if (chunk.element.hidden || ranges.length > 5000) continue;
    const walker = document.createTreeWalker(chunk.element, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const text = node.data.toLowerCase();
      for (const word of wanted) {
        for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
          const range = new Range();
          range.setStart(node, Math.min(at, node.length));
          range.setEnd(node, Math.min(at + word.length, node.length));
          ranges.push(range);
        }
      }
    }
  }
  if (ranges.length) CSS.highlights.set("hit", new Highlight(...ranges));
}

// A neighbour that is pointed at lights up what the chunk has in common with it, and the other way round.
function light(event) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  const line = event.target.closest(".near > li"), mark = event.target.closest(".chunk mark");
  const article = event.target.closest("article");
  if (mark) for (const rank of mark.dataset.of.split(" ")) {
    article.querySelector(`.near > li[data-rank="${rank}"]`).classList.add("lit");
  }
  if (line) for (const one of article.querySelectorAll(".chunk mark")) {
    if (one.dataset.of.split(" ").includes(line.dataset.rank)) one.classList.add("lit");
  }
}

let waiting = 0;
words.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(show, all.length > 2000 ? 200 : 40);
});
words.addEventListener("keydown", event => { if (event.key === "Escape") { words.value = ""; show(); } });
tools.addEventListener("submit", event => { event.preventDefault(); show(); });
for (const choice of choices) choice.addEventListener("change", show);
opened.addEventListener("change", () => {
  for (const near of all) if (near.next) { near.next.open = opened.checked; delete near.next.dataset.found; }
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    words.focus();
  }
});
document.addEventListener("pointerover", light);
offer(source, chunks.map(chunk => chunk.source));
offer(from, all.map(near => near.from));
offer(database, all.map(near => near.database));
tools.hidden = false;
show();
"""
