"""The template of report.html (jinja2), with its style and the few lines of script for the read-out
of curves.
"""

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · mmjax</title>
<style>
:root { --ink: #1b2430; --soft: #5d6b7c; --faint: #8a96a5; --page: #f4f6f8; --card: #fff; --edge: #e2e7ec; --track: #e9eef2;
  --a: #0b7285; --b: #d9480f; --c: #5f3dc4; --d: #2b8a3e; --e: #c2255c; --f: #866118; --correct: #2b8a3e; --correct-soft: #e6f5e9; --heat: 11, 114, 133; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ef; --soft: #a3b0be; --faint: #75828f; --page: #11161c; --card: #1a2129; --edge: #2b3540; --track: #2b3540;
  --a: #3bc9db; --b: #ff922b; --c: #b197fc; --d: #69db7c; --e: #f783ac; --f: #e0b252; --correct: #69db7c; --correct-soft: #1d3325; --heat: 59, 201, 219; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 34px 24px 70px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 13.5px; margin: 0; font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; color: var(--soft); font-size: 14px; }
.facts b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.grid-cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.tile .name { font-weight: 600; overflow-wrap: anywhere; }
.tile .counts { color: var(--faint); font-size: 12.5px; margin-bottom: 12px; }
.heads { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 20px; }
.head .value { font-size: 27px; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.head .label { color: var(--soft); font-size: 12.5px; }
.bar { height: 4px; border-radius: 2px; background: var(--track); margin-top: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--a); border-radius: 2px; }
.chart-title { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; align-items: baseline; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; overflow: visible; cursor: crosshair; }
.grid { stroke: var(--edge); } .tick { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; } .area { stroke: none; opacity: .09; }
{% for letter in "abcdef" %}
.line.s{{ loop.index0 }} { stroke: var(--{{ letter }}); } .area.s{{ loop.index0 }}, .dot.s{{ loop.index0 }} { fill: var(--{{ letter }}); } i.s{{ loop.index0 }} { background: var(--{{ letter }}); }
{% endfor %}
.hover line { stroke: var(--faint); stroke-dasharray: 3 3; } .hover rect { fill: var(--ink); opacity: .92; } .hover text { fill: var(--page); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.examples { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); }
.example { display: flex; gap: 15px; }
.example img.query { width: 92px; height: 92px; border-radius: 8px; border: 1px solid var(--edge); background: #fff; object-fit: contain; flex: none; }
.asked { flex: none; width: 104px; text-align: center; }
.rank { font-size: 12px; color: var(--soft); margin-top: 5px; text-align: center; font-variant-numeric: tabular-nums; } .rank.first { color: var(--correct); font-weight: 600; }
.answers { flex: 1; min-width: 0; }
.answer { display: flex; justify-content: space-between; gap: 8px; font-size: 13px; padding: 2px 7px; border-radius: 5px; }
.answer span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; } .answer span:last-child { color: var(--faint); font-variant-numeric: tabular-nums; }
.answer.correct { background: var(--correct-soft); font-weight: 600; } .answer.correct span:first-child::before { content: "✓ "; color: var(--correct); }
.expected { font-size: 12.5px; color: var(--soft); padding: 5px 7px 0; border-top: 1px solid var(--edge); margin-top: 5px; }
.pictures { display: flex; gap: 8px; margin-top: 10px; }
.shot { flex: 1; text-align: center; font-size: 11.5px; color: var(--faint); font-variant-numeric: tabular-nums; max-width: 84px; }
.shot img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 7px; border: 2px solid var(--edge); background: #fff; display: block; margin-bottom: 2px; }
.shot.correct img { border-color: var(--correct); } .shot.correct { color: var(--correct); font-weight: 600; } .shot.missed { opacity: .75; } .shot.missed img { border-style: dashed; }
.caption { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; } .top { display: flex; justify-content: space-between; gap: 12px; } .top .rank { margin: 0; white-space: nowrap; }
.drawn { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); } .drawn .card { padding: 4px 12px 8px; } .drawn .note { margin: 4px 0 0; }
.scroll { overflow-x: auto; }
table.heat { border-collapse: separate; border-spacing: 2px; font-size: 12px; font-variant-numeric: tabular-nums; }
table.heat td { width: 50px; min-width: 26px; height: 34px; text-align: center; border-radius: 4px; cursor: default; } table.heat td.none { color: transparent; background: var(--track); opacity: .45; }
table.heat td.correct { box-shadow: inset 0 0 0 1.5px var(--correct); }
table.heat th { font-weight: 500; color: var(--soft); text-align: right; padding: 0 8px 0 0; white-space: nowrap; }
table.heat thead th { height: 96px; vertical-align: bottom; padding: 0; } table.heat thead div { width: 50px; } table.heat thead span { display: inline-block; transform: rotate(-38deg); transform-origin: 0 100%; white-space: nowrap; margin-left: 22px; }
.example audio { width: 100%; height: 34px; margin: 4px 0; } svg.curve { width: 104px; cursor: default; overflow: hidden; } table.scores td { text-align: right; } table.scores td:first-child { text-align: left; } table.plain thead td { font-weight: 600; color: var(--soft); }
.note { color: var(--soft); font-size: 13px; margin: 0 0 12px; }
details > summary { cursor: pointer; color: var(--soft); } details > summary:hover { color: var(--ink); }
details.block { margin-top: 14px; } details.block > .charts, details.block > .card { margin-top: 12px; }
.tree { columns: 320px; column-gap: 30px; margin-top: 10px; font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; } .tree details { padding-left: 16px; } .tree > details { padding-left: 0; }
.tree .leaf { break-inside: avoid; padding-left: 30px; text-indent: -14px; overflow-wrap: anywhere; } .tree .leaf b { font-weight: 500; color: var(--soft); } .tree summary { color: var(--ink); font-weight: 600; }
table.plain { border-collapse: collapse; font-size: 13.5px; } table.plain td { padding: 3px 22px 3px 0; vertical-align: top; font-variant-numeric: tabular-nums; } table.plain td:first-child { color: var(--soft); white-space: nowrap; } td.whole { white-space: nowrap; }
footer { margin-top: 50px; color: var(--faint); font-size: 12.5px; }
@media (max-width: 560px) { main { padding: 22px 14px 50px; } .charts, .grid-cards, .examples { grid-template-columns: minmax(0, 1fr); } }
</style></head><body><main>
{% macro draw(charts) %}
<div class="charts">{% for chart in charts %}
<div class="card"><div class="chart-title"><h3>{{ chart.title }}</h3><div class="legend">
{% for item in chart.legend %}<span>{% if chart.legend | length > 1 %}<i class="s{{ item.index }}"></i>{{ item.name }} {% endif %}{{ item.last }}</span>{% endfor %}
</div></div>{{ chart.svg }}</div>{% endfor %}</div>
{% endmacro %}
{% macro tree(node) %}
{% for key, value in node.items() %}{% if value is tree %}<details open><summary>{{ key }}</summary>{{ tree(value) }}</details>
{% else %}<div class="leaf"><b>{{ key }}</b> = {{ "{}" if value is mapping else value.__repr__() }}</div>
{% endif %}{% endfor %}
{% endmacro %}
{% macro rank(row) %}<div class="rank{{ " first" if row.rank == 1 }}">{{ "found first" if row.rank == 1 else "rank %d of %d" % (row.rank, row.of) }}</div>{% endmacro %}
<header><h1>{{ title }}</h1><div class="facts">{% for name, value in facts if value %}<span>{{ name }} <b>{{ value }}</b></span>{% endfor %}</div></header>

{% if tiles %}<h2>Scores</h2><div class="grid-cards">{% for tile in tiles %}
<div class="card tile"><div class="name">{{ tile.name }}</div><div class="counts">{{ tile.counts or " " }}</div>
<div class="heads">{% for head in tile.heads %}<div class="head"><div class="value">{{ head.text }}</div><div class="label">{{ head.label }}</div>
{% if head.bar %}<div class="bar"><i style="width: {{ head.bar }}"></i></div>{% endif %}</div>{% endfor %}</div></div>{% endfor %}</div>
<details class="block"><summary>All metrics</summary><div class="grid-cards card">{% for name, metrics in tables %}
<div><h3>{{ name }}</h3><table class="plain">{% for metric, value in metrics %}<tr><td>{{ metric }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>{% endfor %}</div></details>{% endif %}

{% if charts[0] %}<h2>Training</h2>{{ draw(charts[0]) }}
{% if charts[1] %}<details class="block"><summary>More curves ({{ charts[1] | length }})</summary>{{ draw(charts[1]) }}</details>{% endif %}{% endif %}
{% if time %}<h2>Where the time went</h2>
<p class="note">Goodput {{ "%.1f" | format(100 * time.goodput) }}%: the share of all wall time since the first start, {{ time.wall }}, that computed steps which count.</p>
<div class="charts"><div class="card"><table class="plain">{% for row in time.rows %}<tr><td>{{ row.label }}</td><td class="whole">{{ row.text }}</td><td class="whole">{{ "%.1f" | format(row.share) }}%</td>
<td style="width: 40%"><div class="bar"><i style="width: {{ "%.1f" | format(row.share) }}%"></i></div></td></tr>{% endfor %}</table></div></div>
{% if time.charts %}{{ draw(time.charts) }}{% endif %}{% endif %}
{% if evaluation_charts %}<h2>Evaluation over the run</h2>{{ draw(evaluation_charts) }}{% endif %}

{% for name, figure in retrievals if figure.rows %}
{% set names = {"image": "pictures", "text": "captions", "audio": "sounds", "video": "clips"} %}
<h2>{{ name }}: {{ names.get(figure.query, figure.query) }} to {{ names.get(figure.target, figure.target) }}</h2>
<p class="note">Queries spread over the split, none chosen by hand, each with the five nearest of {{ figure.rows[0].of | number }} and their cosine similarity. Right answers are marked.</p>
<div class="examples">{% for row in figure.rows %}
{% if "picture" not in row.top[0] %}
<div class="card example"><div class="asked">{% if row.picture is defined %}<img class="query" src="{{ row.picture | picture }}" alt="query picture">{% else %}<div class="caption" dir="auto">{{ row.text }}</div>{% endif %}{{ rank(row) }}</div><div class="answers">
{% for hit in row.top %}<div class="answer{{ " correct" if hit.correct }}"><span dir="auto" title="{{ hit.text }}">{{ hit.text }}</span><span>{{ "%.2f" | format(hit.score) }}</span></div>{% endfor %}
{% if row.rank > 5 %}<div class="expected" dir="auto">Correct: {{ row.expected | map(attribute="text") | join(" · ") }}</div>{% endif %}</div></div>
{% else %}
<div class="card"><div class="top"><div class="caption" dir="auto">{{ row.text }}</div>{{ rank(row) }}</div><div class="pictures">
{% for hit in row.top %}<div class="shot{{ " correct" if hit.correct }}"><img src="{{ hit.picture | picture }}" alt="">{{ "✓ " if hit.correct }}{{ "%.2f" | format(hit.score) }}</div>{% endfor %}
{% if row.rank > 5 %}<div class="shot missed"><img src="{{ row.expected[0].picture | picture }}" alt="the correct picture">correct</div>{% endif %}</div></div>
{% endif %}{% endfor %}</div>{% endfor %}

{% for name, figure in texts if figure.rows %}
<h2>{{ name }}: what the model writes</h2><p class="note">Examples spread over the split, none chosen by hand. Right ones are marked.</p>
<div class="examples">{% for row in figure.rows %}<div class="card example"><div class="asked">{% if row.picture is defined %}<img class="query" src="{{ row.picture | picture }}" alt="what the model saw">{% endif %}</div>
<div class="answers"><div class="answer{{ " correct" if row.correct }}"><span dir="auto">{{ row.text or "(nothing)" }}</span></div>
{% if not row.correct %}<div class="expected" dir="auto">Correct: {{ row.expected | join(" · ") }}</div>{% endif %}</div></div>{% endfor %}</div>{% endfor %}

{% for name, figure in dialogues %}
<h2>{{ name }}: by turn</h2><p class="note">Share of exact answers with 95% intervals (dialogues drawn again), and of the same questions without their history.</p>
<div class="card scroll"><table class="plain scores"><thead><tr><td>turn</td><td>exact</td><td>from</td><td>to</td><td>history hidden</td></tr></thead>
{% for turn in figure.turns %}<tr><td>{{ turn.turn }}</td>{% for key in ("share", "low", "high", "hidden") %}<td>{{ "%.3f" | format(turn[key]) if turn[key] is not none else "" }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
<h2>{{ name }}: dialogues</h2><p class="note">Spread over the split, none chosen by hand. The model's own answers are its history; right ones are marked.</p>
<div class="examples">{% for row in figure.rows %}<div class="card example"><div class="asked">{% if row.picture is defined %}<img class="query" src="{{ row.picture | picture }}" alt="what the model saw">{% endif %}</div>
<div class="answers">{% for turn in row.turns %}<div class="note" dir="auto">{{ turn.question }}</div><div class="answer{{ " correct" if turn.correct }}"><span dir="auto">{{ turn.answer or "(nothing)" }}</span></div>
{% if not turn.correct %}<div class="expected" dir="auto">Correct: {{ turn.expected }}</div>{% endif %}{% endfor %}{% if row.judge is defined and row.judge is not none %}<div class="note">A judge gives it {{ row.judge | number }} of 10.</div>{% endif %}</div></div>{% endfor %}</div>{% endfor %}

{% for name, figure in pictures if figure.rows %}
<h2>{{ name }}: what the model draws</h2><p class="note">Captions spread over the split, none chosen by hand: the drawn picture, and the real one beside it. A green frame: the classifier gives it the caption's class.</p>
<div class="drawn">{% for row in figure.rows %}<div class="card"><div class="pictures"><div class="shot{{ " correct" if row.correct }}"><img src="{{ row.picture | picture }}" alt="drawn">drawn</div>
<div class="shot"><img src="{{ row.expected | picture }}" alt="real">real</div></div><div class="note" dir="auto">{{ row.text }}</div></div>{% endfor %}</div>{% endfor %}

{% for name, map in confusions %}
<h2>{{ name }}: confusion</h2><p class="note">Rows are true classes, columns what the model said; colour is the share of the row. {{ map.correct | number }} of {{ map.total | number }} on the diagonal.
{% if map.left_out %} {{ map.left_out }} classes without examples or with the fewest are not drawn.{% endif %}</p>
<div class="card scroll"><table class="heat"><thead><tr><th></th>{% for label in map.names %}<th><div><span>{{ label }}</span></div></th>{% endfor %}</tr></thead>
{% for row in map.rows %}<tr><th>{{ row.name }} ({{ row.count }})</th>{% for cell in row.cells %}
<td title="{{ cell.title }}"{% if not cell.count %} class="none{{ " correct" if cell.correct }}">0{% else %}{% if cell.correct %} class="correct"{% endif %} style="background: rgba(var(--heat), {{ "%.3f" | format(0.08 + 0.82 * cell.share) }}){{ "; color: var(--card)" if cell.share > 0.5 }}">{{ cell.count }}{% endif %}</td>{% endfor %}</tr>{% endfor %}
</table></div>{% endfor %}

{% for name, figure in classes %}
<h2>{{ name }}: classes</h2><div class="card scroll"><table class="plain scores"><thead><tr><td>class</td><td>examples</td><td>precision</td><td>recall</td><td>F1</td><td>AUC</td><td>average precision</td>{% if "threshold" in figure.rows[0] %}<td>threshold</td>{% endif %}</tr></thead>
{% for row in figure.rows %}<tr><td>{{ row.name }}</td><td>{{ row.examples | number }}</td>{% for key in ("precision", "recall", "f1", "auc", "average_precision", "threshold") if key in row or key != "threshold" %}<td>{{ "%.3f" | format(row[key]) if key in row else "" }}</td>{% endfor %}</tr>{% endfor %}
</table></div>{% endfor %}

{% if dots %}<h2>Calibration and values</h2><p class="note">On the diagonal the model is as often right as it is sure, or says the true value.</p>{{ draw(dots) }}{% endif %}

{% for name, figure in mistakes if figure.rows %}
<h2>{{ name }}: the worst mistakes</h2><p class="note">{% if figure.wrong is defined %}{{ figure.wrong | number }} of {{ figure.of | number }} are wrong; here are those that the model is surest of.{% else %}Where the model is farthest off.{% endif %}</p>
<div class="examples">{% for row in figure.rows %}<div class="card example"><div class="asked">{% if row.picture is defined %}<img class="query" src="{{ row.picture | picture }}" alt="what the model saw">{% endif %}{% if row.curve is defined %}{{ row.curve }}{% endif %}</div>
<div class="answers">{% if row.text is defined %}<div class="caption" dir="auto">{{ row.text }}</div>{% endif %}{% if row.sound is defined %}<audio controls preload="none" src="{{ row.sound }}"></audio>{% endif %}
<div class="answer"><span dir="auto">{{ row.said }}</span><span>{{ row.note }}</span></div><div class="expected" dir="auto">Right: {{ row.true }}</div></div></div>{% endfor %}</div>{% endfor %}

{% for name, figure in words if figure.rows %}
<h2>{{ name }}: what is misheard most</h2><div class="card scroll"><table class="plain"><thead><tr><td>in the reference</td><td>said for it</td><td>times</td></tr></thead>
{% for meant, said, count in figure.rows %}<tr><td dir="auto">{{ meant or "(nothing)" }}</td><td dir="auto">{{ said or "(nothing)" }}</td><td>{{ count | number }}</td></tr>{% endfor %}</table></div>{% endfor %}

{% if provenance %}<h2>What the scores are of</h2><div class="card scroll"><table class="plain"><thead><tr><td>evaluator</td><td>checkpoint</td><td>step</td><td>data</td><td>config</td><td>versions</td></tr></thead>
{% for name, about in provenance %}<tr><td>{{ name }}</td><td>{{ about.checkpoint }}</td><td>{{ about.step if about.step is not none else "" }}</td><td>{{ about.data or about.source ~ " " ~ about.split }}</td><td>{{ about.config }}</td><td>{% for package, version in about.versions.items() %}{{ package }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</td></tr>{% endfor %}</table></div>{% endif %}

<h2>Configuration</h2><details class="card"><summary>Every key of the resolved config</summary><div class="tree">{{ tree(config) }}</div></details>
<h2>Environment</h2><div class="card"><table class="plain">{% for name, value in environment %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
<footer>Written by mmjax. This page is one file and loads nothing from anywhere.</footer>
</main>
<script>
const make = (name, attributes, parent, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const {box: [left, top, right, bottom], x: [x0, x1], series} = JSON.parse(svg.dataset.chart);
  const layer = svg.querySelector(".hover"), width = svg.viewBox.baseVal.width;
  svg.addEventListener("pointerleave", () => layer.replaceChildren());
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width * width;
    const x = x0 + (at - left) / (right - left) * (x1 - x0);
    const near = series.map(s => ({name: s.name, point: s.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)}));
    const step = near[0].point[0], px = left + (step - x0) / (x1 - x0) * (right - left);
    const lines = ["step " + step.toLocaleString(), ...near.map(n => (near.length > 1 ? n.name + " " : "") + Number(n.point[1].toPrecision(5)))];
    layer.replaceChildren();
    make("line", {x1: px, x2: px, y1: top, y2: bottom}, layer);
    const size = Math.max(...lines.map(l => l.length)) * 6.4 + 14, bx = px + size + 12 > right ? px - size - 8 : px + 8;
    make("rect", {x: bx, y: top, width: size, height: lines.length * 15 + 8, rx: 5}, layer);
    lines.forEach((line, i) => make("text", {x: bx + 7, y: top + 15 + i * 15}, layer, line));
  });
}
</script></body></html>
"""
