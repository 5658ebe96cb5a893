"""Style and script of the page."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --grey: #5b6470; --line: #d9dde3;
  --c0: #8a93a0; --c1: #1f6feb; --c2: #c2410c; --c3: #15803d; --c4: #8b3fd1; --c5: #0e8a9c; --good: #15803d;
  --bad: #c81e1e; --warn: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1d2229; --ink: #e8eaed; --grey: #9aa4b2; --line: #353c47;
    --c0: #8a93a0; --c1: #6ba6ff; --c2: #ff9a5c; --c3: #5dd28a; --c4: #c79bff; --c5: #4fd3e4; --good: #4cc47c;
    --bad: #ff7b7b; --warn: #f0a648; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center; }
.badge { padding: .1rem .6rem; border-radius: 1rem; color: var(--paper); background: var(--c0); font-weight: 600; }
.badge.running { background: var(--c1); } .badge.done { background: var(--good); }
.badge.died { background: var(--bad); } .badge.stopped { background: var(--warn); }
.note { color: var(--grey); font-size: .9rem; }
.progress { height: .5rem; border-radius: .25rem; background: var(--line); margin: .8rem 0; overflow: hidden; }
.progress i { display: block; height: 100%; background: var(--c1); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: .8rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .5rem .7rem; min-width: 0; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--grey); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .8rem; }
.chart { margin: 0; background: var(--card); border-radius: .5rem; padding: .6rem 1.7rem .3rem .6rem; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem .8rem; align-items: baseline; font-size: .85rem; }
figcaption b { font-size: .95rem; }
figcaption span { color: var(--grey); white-space: nowrap; }
.key { display: inline-block; width: 1.1rem; height: 0; margin-right: .3rem; vertical-align: middle;
  border-top: 2px solid; }
.key.pale { opacity: .45; } .key.dashed, .key.restart { border-top-style: dashed; }
.axes { display: grid; grid-template-columns: 3.4rem 1fr; grid-template-rows: 10rem 1.5rem; margin-top: .4rem; }
.wide .axes { grid-template-rows: 18rem 1.5rem; }
.axes .y, .axes .x, .timeline .x { position: relative; font-size: .75rem; color: var(--grey);
  font-variant-numeric: tabular-nums; }
.axes .y span { position: absolute; right: .4rem; transform: translateY(-50%); white-space: nowrap; }
.x span { position: absolute; transform: translateX(-50%); white-space: nowrap; padding-top: .2rem; }
.axes .x { grid-column: 2; }
.plot { position: relative; min-width: 0; touch-action: pan-y; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .pale { stroke-width: 1; opacity: .4; } .plot .dot { stroke-width: 7; } .plot .dashed { stroke-dasharray: 6 5; }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); }
.c2 { stroke: var(--c2); color: var(--c2); } .c3 { stroke: var(--c3); color: var(--c3); }
.c4 { stroke: var(--c4); color: var(--c4); } .c5 { stroke: var(--c5); color: var(--c5); }
.mark { color: var(--grey); } .plot .mark { stroke: var(--grey); stroke-width: 1; }
.plot .restart { stroke-dasharray: 2 4; }
.cursor { display: none; position: absolute; top: 0; bottom: 0; width: 1px; background: var(--grey); }
output { display: none; position: absolute; top: .3rem; padding: .2rem .5rem; border-radius: .3rem; z-index: 1;
  background: var(--paper); border: 1px solid var(--line); font-size: .78rem; white-space: pre; pointer-events: none;
  font-variant-numeric: tabular-nums; max-width: 100%; overflow: hidden; }
.timeline { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: 0 .8rem; font-size: .85rem;
  background: var(--card); border-radius: .5rem; padding: .6rem 1.6rem .3rem .8rem; }
.row { color: var(--grey); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; max-width: 9rem; }
.track { position: relative; height: 1.5rem; border-bottom: 1px solid var(--line); }
.track i { position: absolute; top: 50%; background: var(--c0); }
.track .bar { height: .7rem; margin-top: -.35rem; border-radius: .2rem; min-width: 3px; }
.track .dot { width: .6rem !important; height: .6rem; margin: -.3rem 0 0 -.3rem; border-radius: 50%; }
.track .good { background: var(--good); } .track .bad { background: var(--bad); }
.track .warn { background: var(--warn); } .track .run { background: var(--c1); }
.timeline .x { height: 2.6rem; } .timeline .x span { white-space: normal; width: 3.6rem; text-align: center;
  line-height: 1.2; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--grey); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; max-width: 42rem; min-width: 4.5rem; }
td:first-child { white-space: nowrap; }
.events td:not(:last-child) { white-space: nowrap !important; } .events td:last-child { min-width: 14rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--c1); }
img, video { max-width: min(100%, 75rem); border-radius: .3rem; } .scroll img { height: auto; max-width: none;
  width: min(100%, 75rem); min-width: 40rem; }
@media (max-width: 40rem) { body { padding: .7rem; } .wide .axes { grid-template-rows: 13rem 1.5rem; }
  td:first-child { white-space: normal; min-width: 9.5rem; }
  .events td:first-child { white-space: normal !important; min-width: 5.4rem; } .row { max-width: 6rem; } }
@media print { .chart, .tile { break-inside: avoid; } }
"""

SCRIPT = """
for (const plot of document.querySelectorAll("[data-chart]")) {
  const { x: [left, right], percent, series } = JSON.parse(plot.dataset.chart);
  const cursor = plot.querySelector(".cursor"), box = plot.querySelector("output");
  const digits = { maximumSignificantDigits: 5 };
  const show = (y) => percent ? (100 * y).toPrecision(3) + " %" : y.toLocaleString("en", digits);
  const nearest = (points, at) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < at) low = middle + 1; else high = middle;
    }
    return low && at - points[low - 1][0] < points[low][0] - at ? points[low - 1] : points[low];
  };
  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect(), part = (event.clientX - area.left) / area.width;
    const at = left + Math.min(1, Math.max(0, part)) * (right - left);
    const found = series.map(([name, points]) => [name, nearest(points, at)]);
    const closest = found.reduce((a, b) => Math.abs(b[1][0] - at) < Math.abs(a[1][0] - at) ? b : a)[1][0];
    cursor.style.left = (closest - left) / (right - left) * 100 + "%";
    box.textContent = "step " + closest.toLocaleString("en") + found.map(([name, [step, y]]) =>
      "\\n" + name + " " + show(y) + (step === closest ? "" : " (step " + step.toLocaleString("en") + ")")).join("");
    box.style.left = part < 0.5 ? "auto" : ".3rem";
    box.style.right = part < 0.5 ? ".3rem" : "auto";
    cursor.style.display = box.style.display = "block";
  });
  plot.addEventListener("pointerleave", () => { cursor.style.display = box.style.display = "none"; });
}
"""
