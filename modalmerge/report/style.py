"""The style sheet of the pages, and what their scripts do."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --panel: #f3f3ee; --ink: #1d1f23; --muted: #62666e; --line: #d9d9d2; --accent: #0b5c92;
  --agnostic: #3f6fa8; --specific: #8463b0; --naive: #cf5a1c; --recipe: #0a8a64; --recipe-2: #57b396;
  --other: #85888f; --right: #0b7a3e; --wrong: #b3261e; --notice: #fdf3d7;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --panel: #1f2226; --ink: #e8e8e4; --muted: #a2a6ad; --line: #383c42; --accent: #7cbcf0;
    --agnostic: #6fa4e3; --specific: #b598e2; --naive: #f58a4b; --recipe: #2ec596; --recipe-2: #8fe0c5;
    --other: #989ca4; --right: #6fd695; --wrong: #ff938a; --notice: #3a3217;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", Roboto, sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, .prose li { max-width: 46rem; }
.subtitle, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .9rem; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85em; }
code { overflow-wrap: anywhere; }
pre {
  background: var(--panel); padding: .75rem 1rem; border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.missing { background: var(--notice); padding: .75rem 1rem; border-radius: 6px; max-width: 46rem; }
.missing ul { margin: .25rem 0 0; padding-left: 1.25rem; }
.facts {
  list-style: none; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr));
}
.facts li { border-left: 4px solid var(--fact, var(--line)); padding: .1rem 0 .1rem .8rem; }
.facts b { display: block; font-size: 1.6rem; line-height: 1.2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; min-width: 40%; }
th, td { padding: .45rem 0 .45rem 1.1rem; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
thead th { vertical-align: bottom; font-weight: 600; font-size: .88rem; border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
thead th.number { white-space: normal; min-width: 7.5rem; }
td .small, th .small { display: block; color: var(--muted); font-size: .82rem; font-weight: 400; }
a.trace { color: inherit; text-decoration: none; border-bottom: 1px dotted var(--muted); }
td > a.trace { font-weight: 600; }
a.trace:hover, a.trace:focus { color: var(--accent); }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 2px; }
.charts {
  display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; min-width: 0; }
.chart { width: 100%; }
.samples {
  display: grid; gap: 1.75rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr));
}
.sample { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 1rem; align-items: start; }
.sample img { width: 9rem; height: auto; border-radius: 4px; border: 1px solid var(--line); }
.sample dl { margin: 0; font-size: .88rem; line-height: 1.4; }
.sample dt { font-weight: 600; margin-top: .5rem; }
.sample dt:first-child { margin-top: 0; }
.sample dd { margin: 0 0 0 .1rem; }
.sample ol { margin: 0; padding-left: 1.3rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.who { color: var(--muted); }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
.many { font-size: .76rem; line-height: 1.3; width: 100%; }
.many th, .many td { padding-left: .4rem; }
.many thead th.number { font-size: .7rem; min-width: 4.6rem; }
.many td .small { white-space: normal; font-size: .66rem; max-width: 4.8rem; margin-left: auto; }
#cells table { font-size: .8rem; }
#cells td { padding-top: .25rem; padding-bottom: .25rem; }
#cells td code { overflow-wrap: anywhere; }
#cells td.id, #cells td.command { min-width: 12rem; }
#cells tr.hidden { display: none; }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); }
@media screen and (max-width: 48rem) {
  tbody th[scope="row"], thead th:first-child { position: sticky; left: 0; background: var(--paper); }
}
@media (max-width: 34rem) {
  body { padding: 1.25rem .9rem 3rem; }
  h1 { font-size: 1.6rem; }
  .sample { grid-template-columns: 6.5rem minmax(0, 1fr); }
  .sample img { width: 6.5rem; }
  thead th.number { min-width: 4.5rem; }
  th, td { padding-left: .7rem; }
  td.number .small { white-space: normal; }
}
@media print {
  :root { --paper: #fff; }
  html { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  .many { font-size: 6.5pt; }
  th, td { padding: .25rem 0 .25rem .5rem; }
  tbody th { overflow-wrap: anywhere; min-width: 5rem; }
  thead { display: table-header-group; }
  thead th.number, .many thead th.number { min-width: 0; font-size: inherit; }
  a.trace { border-bottom: 0; }
  a { color: inherit; }
  #cells table { font-size: 5pt; }
  #cells th, #cells td { padding: .1rem; min-width: 0 !important; overflow-wrap: anywhere; }
  .charts { grid-template-columns: 330px 330px; }
  h2, h3, h2 + p { break-after: avoid; }
  h2 { margin-top: 1.5rem; }
  figure, .sample, tr, .facts li { break-inside: avoid; }
  .samples { grid-template-columns: 1fr 1fr; }
  .sample { grid-template-columns: 6rem minmax(0, 1fr); }
  .sample img { width: 6rem; }
  #show-all { display: none; }
}
"""

# what the page of distances has beside that; ink can be read on every colour of its scales
HEAT = """
:root {
  --alike: #6badde; --unrelated: #ebe8de; --opposed: #f0935a; --little: #eeece4; --much: #b093dc;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --alike: #1d679f; --unrelated: #2f3237; --opposed: #a34f1b; --little: #2a2d31; --much: #6b4da3; }
}
.subtitle, .prose li { overflow-wrap: anywhere; }
.scale {
  display: block; position: relative; height: .6rem; border-radius: 3px; margin-bottom: .35rem;
  background: linear-gradient(to right, var(--colours)); print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.scale i {
  position: absolute; top: -.2rem; bottom: -.2rem; width: .35rem; margin-left: -.175rem;
  background: var(--ink); border: 1px solid var(--paper); border-radius: 2px;
}
.overall .reading { min-width: 15rem; font-size: .9rem; }
.overall .reading .scale { margin-top: .35rem; }
.overall thead th.number { min-width: 0; }
.overall th .small { max-width: 15rem; }
.legend { display: flex; flex-wrap: wrap; justify-content: space-between; font-size: .78rem; color: var(--muted); }
.legend .scale { width: 100%; margin-bottom: .15rem; }
.heat { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 2rem 1.75rem; align-items: end; }
.heat > div { min-width: 0; }
.heat h3, .heat .note { margin: 0 0 .25rem; }
.track { display: block; width: 8rem; height: .5rem; margin: .2rem 0 0 auto; background: var(--panel); }
.bar { display: block; height: 100%; background: var(--much); print-color-adjust: exact; }
.parameters th code { display: block; min-width: 14rem; font-weight: 400; }
.parameters thead th.number, details thead th.number { min-width: 0; }
@media screen and (max-width: 48rem) {
  .overall, .overall tbody, .overall tr, .overall th, .overall td { display: block; }
  .overall thead { display: none; }
  .overall tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  .overall th, .overall td { border: 0; padding: .1rem 0; }
  .overall td.number { display: flex; justify-content: space-between; }
  .overall td.none { display: none; }
  .overall td.number::before { content: attr(data-title); color: var(--muted); }
  .overall th .small { max-width: none; }
  .parameters tbody th[scope="row"], .parameters thead th:first-child { position: static; }
}
@media print {
  html { font-size: 9pt; }
  .heat > div { break-inside: avoid; }
  .parameters table, details table { font-size: 7pt; }
  .parameters th code { min-width: 0; }
}
"""

# draws every figure of the page, again when colours or paper change
DRAW = """
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = {displaylogo: false, responsive: true, displayModeBar: false};
  const coloured = (value, style) => {
    if (typeof value === "string" && value.startsWith("--")) return style.getPropertyValue(value).trim();
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const print = matchMedia("print").matches;
    for (const [id, figure] of Object.entries(figures)) {
      const {data, layout} = coloured(figure, style);
      // paper is laid out before a chart could measure its place: it gets its width from here
      const place = document.getElementById(id);
      const width = print ? (place.closest(".charts") ? 330 : 680) : undefined;
      Plotly.react(id, data, {...layout, width}, config);
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
"""

# leads from a number to its cells, and prints what is folded away
TRACE = """
  // paper shows what is folded away, but for the table of cells, which would be most of it
  let unfolded = [];
  window.addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not([open]):not(#cells)")];
    for (const details of unfolded) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of unfolded) details.open = false;
  });
  const rows = document.querySelectorAll("#cells tbody tr");
  const cells = document.getElementById("cells");
  const all = document.getElementById("show-all");
  const show = (wanted) => {
    rows.forEach((row, index) => row.classList.toggle("hidden", wanted !== null && !wanted.has(index)));
    all.hidden = wanted === null;
  };
  all.addEventListener("click", () => show(null));
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.trace");
    if (!link) return;
    show(new Set(link.dataset.cells.split(" ").map(Number)));
    cells.open = true;
  });
"""
