"""The page of the report: one HTML file, pictures inside, no script and nothing to fetch."""

TEMPLATE = """{%- macro figure(e) -%}
<figure class="shot">{% if e.picture %}<img src="{{ e.picture.uri }}" width="{{ e.picture.width_px }}"
height="{{ e.picture.height_px }}" alt="{{ e.alt }}">{% else %}<div class="none">no picture</div>
{% endif %}<figcaption><bdi class="name">{{ e.name }}</bdi>{% if e.facts %} <span class="quiet">{{ e.facts }}</span>
{% endif %}{% if e.text %} <bdi class="said">{{ e.text }}</bdi>{% endif %}</figcaption></figure>
{%- endmacro -%}
{%- macro chart(c) -%}
<section class="card"><h3>{{ c.title }}</h3><p>{{ c.text }}</p>{{ c.svg }}
<details><summary>Numbers</summary><div class="scroll"><table><tr><th>{{ c.unit or "range" }}</th><th
class="n">kept</th>
{% if c.both %}<th class="n">not kept</th>{% endif %}</tr>
{% for bar in c.bars %}<tr><td>{{ bar.label }}</td><td class="n">{{ bar.kept | num }}</td>
{% if c.both %}<td class="n">{{ bar.other | num }}</td>{% endif %}</tr>
{% endfor %}</table></div></details></section>
{%- endmacro -%}
{%- macro bars(c) -%}
<section class="card"><h3>{{ c.title }}</h3>{% if c.text %}<p>{{ c.text }}</p>{% endif %}
<div class="scroll"><table class="bars">{% for row in c.rows %}<tr><td><bdi>{{ row.name }}</bdi>{% if row.note %}
<small>{{ row.note }}</small>{% endif %}</td><td class="n">{{ row.number | num }}</td>
<td class="track"><span class="bar" style="width:{{ row.percent }}%"></span></td></tr>
{% endfor %}</table></div></section>
{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Curation report: {{ source }}</title>
<style>
:root{--ink:#1c2330;--quiet:#5b6573;--paper:#fff;--panel:#f5f7fa;--line:#d5dae2;--kept:#2563a8;--rejected:#e08a2e;
--quarantined:#b84a5a;--link:#2563a8;--heat:37,99,168}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ef;--quiet:#a3adbb;--paper:#14181f;--panel:#1d232d;--line:#38414f;
--kept:#5b9be0;--rejected:#e39b4b;--quarantined:#dd7686;--link:#8bbcf2;--heat:91,155,224}}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,sans-serif;margin:0 auto;max-width:1160px;padding:1.6em 1.2em 4em;color:var(--ink);
background:var(--paper);overflow-wrap:break-word}
h1{font-size:1.7em;margin:0 0 .1em;line-height:1.25} h3{font-size:1em;margin:1.3em 0 .25em}
h2{font-size:1.28em;margin:2.4em 0 .5em;padding-top:.5em;border-top:1px solid var(--line)}
p{max-width:52em;margin:.5em 0} a{color:var(--link)} small,.quiet{color:var(--quiet)} small{display:block}
code{font-size:.92em;overflow-wrap:anywhere} bdi{unicode-bidi:isolate}
nav ul{display:flex;flex-wrap:wrap;gap:.3em 1.4em;list-style:none;padding:0;margin:1em 0 0}
table{border-collapse:collapse} td,th{padding:.3em 1em .3em 0;text-align:left;vertical-align:top}
th{font-weight:600;border-bottom:1px solid var(--line)} td:last-child,th:last-child{padding-right:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} .scroll{overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5em,1fr));gap:12px;margin:1.2em 0}
.tile{border:1px solid var(--line);border-radius:8px;padding:.6em .9em;background:var(--panel)}
.tile b{display:block;font-size:1.55em;line-height:1.25;font-variant-numeric:tabular-nums}
.tile i{display:block;height:4px;border-radius:2px;margin-top:.45em}
.kept{background:var(--kept);fill:var(--kept)} .lost,.rejected{background:var(--rejected);fill:var(--rejected)}
.quarantined{background:var(--quarantined);fill:var(--quarantined)}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .4em 0 0;vertical-align:-.05em}
.legend{display:flex;flex-wrap:wrap;gap:.2em 1.6em;margin:.7em 0 1em;padding:0;list-style:none}
.funnel{list-style:none;margin:0;padding:0}
.funnel>li{display:grid;grid-template-columns:13.5em minmax(0,1fr) 17em;gap:.2em 1.4em;padding:.65em 0;
border-top:1px solid var(--line);align-items:center}
.stage{overflow-wrap:anywhere}
.flow{display:flex;height:30px;background:var(--panel);border-radius:4px;overflow:hidden}
.flow span{display:block;height:100%;flex:none;min-width:1px}
.left{display:block;font-size:.9em;font-variant-numeric:tabular-nums}
.losses{list-style:none;margin:0;padding:0;font-size:.92em;font-variant-numeric:tabular-nums}
.losses li{display:grid;grid-template-columns:.9em minmax(2.4em,max-content) minmax(0,1fr);align-items:baseline;
column-gap:.6em}
.losses .n{font-weight:600}
.sum{font-size:1.05em;font-weight:600;border-top:2px solid var(--line);padding-top:.8em;margin-top:0;max-width:none}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px;margin:1em 0}
.card{border:1px solid var(--line);border-radius:8px;padding:.9em 1em;min-width:0}
.card h3{margin-top:0} .card p{font-size:.92em;
margin:.2em 0 .6em}
.card svg{width:100%;max-width:460px;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--quiet)} svg .grid{stroke:var(--line);stroke-dasharray:2 3}
svg .axis{stroke:var(--quiet)} svg line.mark{stroke:var(--ink);stroke-dasharray:3 3;opacity:.65}
svg text.mark{fill:var(--ink)}
details{font-size:.92em;margin-top:.5em} summary{cursor:pointer;color:var(--link)}
.bars{width:100%;font-size:.93em} .bars td{padding-right:.8em} .track{width:34%;vertical-align:middle}
.bar{display:block;height:.7em;background:var(--kept);border-radius:2px;min-width:1px}
.heat{width:100%;font-size:.93em} .heat td,.heat th{padding:.45em .5em;text-align:right;border:1px solid var(--line);
font-variant-numeric:tabular-nums} .heat th{border-bottom:1px solid var(--line)}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));gap:16px 14px;margin:.8em 0 1.6em}
.shot{margin:0;font-size:12px;line-height:1.35;overflow-wrap:anywhere;min-width:0}
.shot img{max-width:100%;height:auto;display:block;border:1px solid var(--line);border-radius:3px;margin-bottom:5px}
.shot figcaption>*{display:block} .shot .name{font-weight:600}
.shot .said{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:4;overflow:hidden}
.none{height:100px;max-width:160px;background:var(--panel);border:1px dashed var(--line);border-radius:3px;
display:flex;
align-items:center;justify-content:center;color:var(--quiet);margin-bottom:5px}
.badge{display:inline-block;border-radius:10px;padding:0 .6em;font-size:.85em;white-space:nowrap;border:1.5px solid}
.badge.rejected{background:none;border-color:var(--rejected)}
.badge.quarantined{background:none;border-color:var(--quarantined)}
.reasons td{padding-top:.5em;padding-bottom:.5em;border-bottom:1px solid var(--line)}
.knob{white-space:nowrap;font-size:.9em;color:var(--quiet)}
.clusters{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,550px),1fr));gap:14px;margin:1em 0}
.cluster{display:grid;grid-template-columns:171px minmax(0,1fr);gap:12px 14px;align-content:start;
border:1px solid var(--line);border-radius:8px;padding:.9em 1em} .cluster h3{grid-column:1/-1;margin:0}
.cluster .sheet{margin:0;grid-template-columns:repeat(auto-fill,160px)}
.cluster>.shot{border-right:1px solid var(--line);padding-right:10px}
@media(max-width:760px){body{padding:1.1em .8em 3em}
.funnel>li{grid-template-columns:1fr;gap:.35em} .reasons,.reasons tbody,.reasons tr,.reasons td{display:block}
.reasons tr:first-child{display:none} .reasons td{border:0;padding:.1em 0}
.reasons td:nth-child(n+3){display:inline;margin-right:.7em;color:var(--quiet)}
.reasons td:nth-child(4)::after{content:" images"}
.reasons td:nth-child(5)::after{content:" of all"}
.reasons tr{padding:.7em 0;border-bottom:1px solid var(--line)} .cluster{grid-template-columns:1fr}
.cluster>.shot{border:0;padding:0} .sheet{grid-template-columns:repeat(auto-fill,minmax(130px,1fr))}}
@media print{.card,.cluster,.shot{break-inside:avoid}}
</style></head><body>
<header><h1>Curation report</h1>
<p>What came in from <code><bdi>{{ source }}</bdi></code>, what was kept for training, what was not, and why.
Nothing was
deleted: every image that was not kept is listed in <code>quarantine/</code> with its reason and where its bytes
lie.</p>
{% if not counts.kept %}<p><b>Nothing was kept, so no data set was made.</b></p>{% endif %}
<div class="tiles">{% for t in tiles %}<div class="tile"><b>{{ t.value }}</b>{{ t.label }}
{% if t.kind %}<i class="{{ t.kind }}"></i>{% endif %}</div>{% endfor %}</div>
<nav aria-label="Contents"><ul>{% for s in contents %}<li><a href="#{{ s.id }}">{{ s.title }}</a></li>{% endfor
%}</ul></nav>
</header><main>

<h2 id="funnel">The funnel</h2>
<p>The stages in the order in which they ran. The whole width stands for all {{ counts.seen | num }} images that came
in; per cent are of these.</p>
<ul class="legend"><li><span class="key kept"></span>goes on</li><li><span class="key rejected"></span>rejected: {{
verdicts.rejected }}</li><li><span class="key quarantined"></span>quarantined: {{ verdicts.quarantined }}</li></ul>
<ol class="funnel">{% for s in funnel %}<li><div class="stage"><b>{{ s.name }}</b>{% if s.does %}<small>{{ s.does
}}</small>
{% endif %}</div><div><div class="flow" role="img" aria-label="{{ s.name }}: {{ s.kept | num }} of {{ s.arrived |
num }} go on">{% for kind, width in s.widths %}<span class="{{ kind }}" style="width:{{ width }}%"></span>{% endfor
%}</div>
<span class="left">{{ s.arrived | num }} came, {{ s.kept | num }} went on ({{ s.kept_share }} of all)</span></div>
<ul class="losses">{% for l in s.losses %}<li><span class="key {{ l.verdict }}"></span><span class="n">{{
l.images | num }}</span><span><a href="#reason-{{ l.id }}">{{ l.reason }}</a> <span class="quiet">{{ l.share
}}</span></span>
</li>{% else %}<li><span></span><span class="n">0</span><span class="quiet">held back</span></li>{% endfor
%}</ul></li>
{% endfor %}</ol>
<p class="sum">{{ counts.seen | num }} seen = {{ counts.kept | num }} kept + {{ rejected | num }} rejected + {{
quarantined | num }} quarantined</p>
<p class="quiet">Not images, and not counted: {{ counts.ignored_files | num }} files that were passed over (hidden, or
records of a downloader), and {{ counts.captions_without_image | num }} caption files without an image.{% if
counts.retryable %} {{ counts.retryable | num }} of the quarantined images failed for a passing reason; the same
command
with <code>--retry-failed</code> tries these again.{% endif %}</p>

{% if reasons %}<h2 id="reasons">What was not kept, and why</h2>
<table class="reasons"><tr><th>reason</th><th>what it means</th><th>stage</th><th class="n">images</th><th
class="n">of
all</th></tr>
{% for r in reasons %}<tr id="reason-{{ r.id }}"><td><b>{{ r.reason }}</b><br><span class="badge {{ r.verdict }}">{{
r.verdict }}</span></td><td>{{ r.text }}{% for name, value in r.knobs %}<br><span class="knob"><code>{{ name
}}</code> = {{
value }}</span>{% endfor %}{% if r.shown %}<br><a href="#shown-{{ r.id }}">examples</a>{% endif %}</td>
<td>{{ r.stage }}</td><td class="n">{{ r.images | num }}</td><td class="n">{{ r.share }}</td></tr>
{% endfor %}</table>{% endif %}

{% if charts %}<h2 id="sizes">Sizes and shapes</h2>
<p>Blue are the kept images, orange on top those that were not kept, as far as their size is known{% if
unknown_sizes %}
({{ unknown_sizes | num }} were set aside before that){% endif %}.</p>
<div class="cards">{% for c in charts.sizes %}{{ chart(c) }}{% endfor %}{{ bars(charts.buckets) }}</div>
{% if fits %}<details><summary>How the images fit their buckets</summary><div class="scroll"><table>
<tr><th>bucket</th><th class="n">images</th><th class="n">smaller than it</th><th class="n">cropped, mean</th>
<th class="n">at most</th>{% for label in crop_labels %}<th class="n">{{ label }}</th>{% endfor %}<th>merged
from</th></tr>
{% for row in fits %}<tr><td>{{ row.bucket }}</td><td class="n">{{ row.images | num }}</td><td class="n">{{
row.enlarged | num }}</td><td class="n">{{ "%.1f %%" | format(100 * row.cropped_mean_frac) }}</td>
<td class="n">{{ "%.1f %%" | format(100 * row.cropped_max_frac) }}</td>{% for number in
row.cropped_histogram.values() %}
<td class="n">{{ number | num }}</td>{% endfor %}<td>{{ row.merged_from | join(", ") }}</td></tr>
{% endfor %}</table></div><p class="quiet">At the sizes of the 1024 px class. Cropped: share of an image's area
outside
the centre crop; the columns after it count images by that share. Images are never distorted; a smaller one is
enlarged.</p></details>{% endif %}

{% if charts.quality %}<h2 id="quality">Quality</h2>
<p>What was measured of every image that came as far as the stage that measures it. Blue are the kept images, orange
on top
those that a later stage held back. Dashed lines are limits.</p>
<div class="cards">{% for c in charts.quality %}{{ chart(c) }}{% endfor %}</div>{% endif %}

{% if heat %}<h2 id="tiers">Tiers and episodes</h2>
<p>A tier says how good an image is: A1 is the lowest, A5 the best. An episode bucket says when in training it gains
weight: B1 early, B8 late. Each cell counts the kept images with both.</p>
<div class="scroll"><table class="heat"><tr><th></th>{% for name in heat.columns %}<th>{{ name }}</th>{% endfor
%}<th>all</th>
</tr>{% for row in heat.rows %}<tr><th>{{ row.name }}</th>{% for cell in row.cells %}<td{% if cell.number %}
style="background:rgba(var(--heat),{{ cell.alpha }})"{% endif %}>{{ cell.number | num }}</td>{% endfor %}<td>{{
row.total | num }}</td></tr>{% endfor %}</table></div>{% endif %}

<h2 id="captions">Captions</h2>
<p>{{ caption_sentence }}</p>
<div class="cards">{% for c in charts.captions %}{{ chart(c) }}{% endfor %}{% for c in charts.caption_bars %}{{
bars(c) }}
{% endfor %}</div>

<h2 id="origin">Licences and notes</h2>
<div class="cards">{% for c in charts.origin %}{{ bars(c) }}{% endfor %}</div>{% endif %}

{% if duplicates %}<h2 id="duplicates">Duplicates</h2>
<p>{{ duplicates.sentence }}</p>
<div class="cards">{% for c in duplicates.charts %}{{ bars(c) }}{% endfor %}</div>
{% if duplicates.clusters %}<p>Below, the kept image is on the left and what was held back as its copy on the right:
{{
duplicates.which }}. Distance: in how many of 64 bits the fingerprints of the two pictures differ. Copies with
the same bytes have no picture of their own.</p>
<div class="clusters">{% for c in duplicates.clusters %}<section class="cluster"><h3>{{ c.title }}</h3>{{
figure(c.kept) }}
<div class="sheet">{% for e in c.copies %}{{ figure(e) }}{% endfor %}</div></section>{% endfor %}</div>{% endif %}{%
endif %}

{% if kept %}<h2 id="kept">Kept images</h2>
<p>{{ kept | length | num }} of {{ counts.kept | num }}, drawn by the hash of their content: nobody chose them.</p>
<div class="sheet">{% for e in kept %}{{ figure(e) }}{% endfor %}</div>{% endif %}
{% if tiers %}<h2 id="by-tier">Kept images by tier</h2>
{% for t in tiers %}<h3>{{ t.title }}</h3><div class="sheet">{% for e in t.examples %}{{ figure(e) }}{% endfor
%}</div>
{% endfor %}{% endif %}
{% if dropped %}<h2 id="not-kept">Images that were not kept</h2>
<p>Up to {{ examples_per_reason }} for each reason, drawn in the same way. Damaged images have no picture, nor have
those that ended a process or would need too much memory.</p>
{% for d in dropped %}<h3 id="shown-{{ d.id }}">{{ d.reason }} <span class="quiet">({{ d.stage }}, {{ d.images | num
}}
image{{ "" if d.images == 1 else "s" }})</span></h3><p>{{ d.text }}</p>
<div class="sheet">{% for e in d.examples %}{{ figure(e) }}{% endfor %}</div>{% endfor %}{% endif %}

<h2 id="made">How this was made</h2>
<div class="scroll"><table><tr><td>input</td><td><code><bdi>{{ source }}</bdi></code>, {{ parts | num }}
parts</td></tr>
<tr><td>output</td><td>{{ shards }}</td></tr>
<tr><td>program</td><td>{{ program }}</td></tr></table></div>
<h3>Recipe</h3>
<div class="scroll"><table><tr><th>stage</th><th>from</th><th>version</th><th class="n">in</th><th
class="n">kept</th></tr>
{% for s in recipe %}<tr><td>{{ s.name }}</td><td><code>{{ s.spec }}</code></td><td><code>{{ s.version }}</code></td>
<td class="n">{{ s.arrived | num }}</td><td class="n">{{ s.kept | num }}</td></tr>{% endfor %}</table></div>
<h3>Settings</h3>
{% for s in settings %}<details><summary>{{ s.name }}</summary><div class="scroll"><table>{% for name, value, help
in s.rows %}
<tr><td><code>{{ name }}</code></td><td>{{ value }}</td><td class="quiet">{{ help }}</td></tr>{% endfor
%}</table></div>
</details>{% endfor %}
</main></body></html>
"""
