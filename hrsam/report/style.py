"""The style sheet of a report's pages: light, dark and on paper, from a phone's width to a wide screen."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f5f7f9;--ink:#15191e;--soft:#56606b;--rule:#d8dee5;
--main:#15191e;--c0:#0072b2;--c1:#c2520a;--c2:#00805e;--c3:#9c4a86;--c4:#8a6d00;--c5:#5a5fc7;
--t0:#8fb8dc;--t1:#4f90c9;--t2:#1f66a8;--t3:#0b3564;--bad:#c2520a;--good:#0072b2;--note:#fff4d6;--note-rule:#d9a400}
@media (prefers-color-scheme:dark){:root{--bg:#14181d;--panel:#1c2229;--ink:#e8ebee;--soft:#a3adb8;--rule:#353e48;
--main:#f4f6f8;--c0:#5ab4ea;--c1:#f29150;--c2:#3dc79c;--c3:#dc8fc8;--c4:#d9bd4a;--c5:#a5a9ff;
--t0:#3f6c96;--t1:#5a96cb;--t2:#8fc1ec;--t3:#d4e9fb;--bad:#f29150;--good:#5ab4ea;--note:#332b14;--note-rule:#b98e12}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1360px;margin:0 auto;padding:28px clamp(16px,3vw,40px) 64px}
h1{font-size:clamp(1.5rem,3.2vw,2.1rem);line-height:1.2;margin:0 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.4em 0 .7em;padding-top:.9em;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2em 0 .4em}
p,ul{margin:.4em 0;max-width:78ch}ul{padding-left:1.2em}li{margin:.2em 0;overflow-wrap:anywhere}
.soft{color:var(--soft)}.small{font-size:.875rem}
.note{background:var(--note);border-left:4px solid var(--note-rule);padding:.6em .9em;margin:.9em 0;border-radius:2px}
.lead{font-size:1.1rem;margin:.5em 0 1em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:1.3em 0 .6em}
.tile{background:var(--panel);border-radius:8px;padding:14px 16px}
.tile b{display:block;font-size:1.85rem;line-height:1.15;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:.875rem;line-height:1.35;margin-top:4px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:28px 32px}
figure{margin:0;min-width:0}
.figures{margin-top:1.8em}.figures figure{display:flex;flex-direction:column;justify-content:space-between}
figcaption{margin-bottom:.5em}figcaption b{display:block}
figcaption span{color:var(--soft);font-size:.875rem;line-height:1.4;display:block}
svg{display:block;width:100%;height:auto;max-width:560px}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}
.line{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.band{fill:var(--k);opacity:.13}.bar{fill:var(--k)}.dot{fill:var(--k)}svg text.name{fill:var(--k);font-weight:600}
.main{--k:var(--main)}.line.main{stroke-width:3.2}.many{--k:var(--soft)}.line.many{stroke-width:1;opacity:.6}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}.c5{--k:var(--c5)}
.line.c1{stroke-dasharray:7 4}.line.c2{stroke-dasharray:2 4}.line.c3{stroke-dasharray:9 4 2 4}
.line.c4{stroke-dasharray:4 3}.line.c5{stroke-dasharray:12 4}
.t0{--k:var(--t0)}.t1{--k:var(--t1)}.t2{--k:var(--t2)}.t3{--k:var(--t3)}
.good{--k:var(--good)}.bad{--k:var(--bad)}
.wide{overflow-x:auto;margin:.8em 0}
table{border-collapse:separate;border-spacing:0;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600}thead th{color:var(--soft);font-size:.875rem;vertical-align:bottom;white-space:normal;line-height:1.25}
th:first-child,td:first-child{text-align:left;padding-left:0}
tbody th{font-weight:500}.wide th:first-child{position:sticky;left:0;background:var(--bg);max-width:48vw;overflow:hidden;
text-overflow:ellipsis}
tbody tr:hover>*{background:var(--panel)}td.spark{padding:0 6px}.spark svg,svg.spark{width:80px;height:20px}
.tables{display:flex;flex-wrap:wrap;gap:8px 56px}.tables>*{min-width:0;max-width:100%}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:26px 22px}
.cases figcaption{margin:.5em 0 0}.cases b{overflow-wrap:anywhere}
.cases .photo{background:var(--panel);border-radius:6px;overflow:hidden;display:flex;align-items:center;
justify-content:center;height:360px}
.cases img{max-width:100%;max-height:100%;object-fit:contain;display:block}
.key{display:flex;flex-wrap:wrap;gap:6px 22px;margin:.3em 0 1.1em;font-size:.875rem;list-style:none;padding:0;max-width:none}
.key li{display:flex;align-items:center;gap:7px}.key i{width:16px;height:16px;border-radius:3px;display:inline-flex;
align-items:center;justify-content:center;font:bold 14px/1 sans-serif}
.key .outline{background:#999;box-shadow:inset 0 0 0 1px #000,inset 0 0 0 3px #fff,inset 0 0 0 4px #000}
.key .plus{border-radius:50%;background:#fff;color:#000;box-shadow:0 0 0 1px #000}
.key .minus{border-radius:50%;background:#000;color:#fff;box-shadow:0 0 0 1px #fff}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 16px;margin:.4em 0;font-size:.9375rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:4px 48px}
.list{max-height:78vh;overflow:auto}.list thead th{position:sticky;top:0;background:var(--bg);z-index:1}
.list thead th:first-child{z-index:2}
@media (max-width:600px){thead th{max-width:9em;overflow-wrap:break-word}
th,td{padding:5px 8px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5em}
.cases .photo{height:auto}
.tiles{grid-template-columns:1fr 1fr}.tile b{font-size:1.5rem}}
@media print{:root{color-scheme:light;--bg:#fff;--panel:#f5f7f9;--ink:#000;--soft:#444;--rule:#bbb;--main:#000;
--c0:#0072b2;--c1:#c2520a;--c2:#00805e;--c3:#9c4a86;--c4:#8a6d00;--c5:#5a5fc7;
--t0:#8fb8dc;--t1:#4f90c9;--t2:#1f66a8;--t3:#0b3564;--bad:#c2520a;--good:#0072b2;--note:#fff;--note-rule:#000}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:11pt}main{padding:0;max-width:none}
.wide,.list{overflow:visible;max-height:none}.wide th:first-child,.list thead th{position:static}
.figures{grid-template-columns:1fr 1fr}.cases{grid-template-columns:repeat(3,1fr)}.cases .photo{height:190px}
figure,tr,.tile{break-inside:avoid}h2,h3{break-after:avoid}table{font-size:9pt}th,td{padding:2px 6px}}
"""
