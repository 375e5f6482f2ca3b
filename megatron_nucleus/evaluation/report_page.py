"""The page of the run report: one HTML file, pictures inside, no script and nothing to fetch."""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#1c2330;background:#fff}
h1{font-size:1.6em;margin-bottom:.2em} h2{font-size:1.2em;margin-top:2.2em;border-bottom:1px solid #d5dae2}
p{max-width:52em} small,.quiet{color:#5b6573}
table{border-collapse:collapse;margin:.6em 0} td,th{padding:.22em 1.1em .22em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #d5dae2} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
tr.mean td{border-top:1px solid #d5dae2;font-weight:600}
.bar{background:#2563a8;height:.75em;display:inline-block;min-width:1px}
.tiles{display:flex;flex-wrap:wrap;gap:14px;margin:1em 0}
.tile{border:1px solid #d5dae2;border-radius:8px;padding:.6em 1.1em}
.tile b{display:block;font-size:1.45em}
.sheet{display:flex;flex-wrap:wrap;gap:14px}
.sheet figure{margin:0;width:148px;font-size:12px;line-height:1.3;overflow-wrap:anywhere}
.sheet img{width:148px;border:1px solid #c9ced6;display:block;margin-bottom:4px}
.sheet img.pixels{image-rendering:pixelated}
.steps{display:flex;flex-wrap:wrap;gap:18px}.steps figure{margin:0;width:520px;max-width:100%}
.steps img,img.figure{max-width:100%;height:auto}
figcaption{font-size:12.5px} small.seed{display:block}
code,pre{font-size:12.5px} pre{overflow:auto;background:#f5f6f8;padding:.8em}
</style></head><body>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ summary }}</p>{% endif %}
{% if tiles %}<div class="tiles">{% for label, value in tiles %}
<div class="tile"><b>{{ value }}</b>{{ label }}</div>{% endfor %}</div>{% endif %}

{% if pictures %}<h2>Generated pictures</h2>
<p>Drawn by the trained model from the text under each picture and from nothing else{{ pictures_note }}.</p>
<div class="sheet">{% for p in pictures %}<figure><img class="{{ 'pixels' if p.small else '' }}" src="{{ p.uri }}"
alt="{{ p.prompt }}">{{ p.prompt or '(no prompt)' }} <small class="seed">seed {{ p.seed }}</small></figure>
{% endfor %}</div>
{% endif %}

{% if scores %}<h2>Scores</h2>
<p>A program looks at each picture and checks whether it shows what the prompt asks for: the right shapes, how many,
in which colours and where. The share of correct pictures is the score; 1 is perfect. {{ scores_note }}</p>
<img class="figure" src="{{ scores.figure }}" alt="bar chart of the scores per skill">
<table><tr><th>skill</th>{% for name in scores.names %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for row in scores.rows %}<tr class="{{ 'mean' if row.mean else '' }}"><td>{{ row.label }}</td>
{% for value in row.cells %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}

{% if previews %}<h2>How the pictures came about</h2>
<p>The same prompts with the same noise, drawn again and again while the model was trained.</p>
<div class="steps">{% for p in previews %}<figure><img src="{{ p.uri }}" alt="pictures after step {{ p.step }}">
<figcaption>after step {{ p.step }}{% if p.samples %} ({{ p.samples }} images seen){% endif %}</figcaption></figure>
{% endfor %}</div>{% endif %}

{% if loss %}<h2>Training loss</h2>
<p>How far the model's predictions are from the truth, on average: lower is better. The thin line is every logged
step, the thick one the mean of {{ loss.window }} steps, from {{ loss.first }} at the start to {{ loss.last }} at the
end.{% if loss.skipped %} {{ loss.skipped }} steps were left out because their gradient was not finite.{% endif %}</p>
<img class="figure" src="{{ loss.figure }}" alt="loss over training steps">
<p>The size of the updates, the learning rate and the speed during training.</p>
<img class="figure" src="{{ loss.health }}" alt="gradient norm, learning rate and images per second">{% endif %}

{% if allocation %}<h2>Which experts work where</h2>
<p>The model is a mixture of experts: beside a shared one that sees everything, each MoE layer has
{{ allocation.experts }} experts, and each of them chooses the parts of the picture (tokens) it works on. The map shows
how many experts took each part of “{{ allocation.prompt }}”, layer by layer (rows, the first is 0) and at several noise
levels (columns; 1 is pure noise, where a drawing begins). White parts were left to the shared expert alone. On average
{{ allocation.mean }} experts took a part; {{ allocation.untaken }} of the parts were taken by none.</p>
<img class="figure" src="{{ allocation.figure }}" alt="maps of how many experts took each token">
<p>Which parts each expert took at noise level {{ allocation.sigma }}: what it did not take is
darkened.{{ allocation.note }}</p>
<img class="figure" src="{{ allocation.which }}" alt="tokens taken by each expert">{% endif %}

{% if timings %}<h2>Time</h2>
<p>Where the time went, stage by stage.</p>
<table><tr><th>stage</th><th class="n">seconds</th><th class="n">share</th><th></th></tr>
{% for row in timings %}<tr class="{{ 'mean' if row.total else '' }}"><td>{{ row.name }}</td>
<td class="n">{{ row.seconds }}</td><td class="n">{{ row.share }}</td>
<td>{% if not row.total %}<span class="bar" style="width:{{ row.width }}px"></span>{% endif %}</td></tr>
{% endfor %}</table>{% endif %}

{% if facts or config %}<h2>Settings</h2>
<p>What was trained, with which settings and versions.</p>
{% if facts %}<table>{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>{% endif %}
{% if config %}<details><summary>every setting of the training run (config.yaml)</summary>
<pre>{{ config }}</pre></details>{% endif %}{% endif %}
{% if commands %}<h2>Commands</h2><p>Each result can be made again with its command.</p>
<pre>{% for command in commands %}{{ command }}
{% endfor %}</pre>{% endif %}
</body></html>
"""
