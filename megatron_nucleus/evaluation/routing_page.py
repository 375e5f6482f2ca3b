"""The routing page: one HTML file with its data inside, nothing to fetch, that works from a disk.

State lives in the location hash: ``#layer=5&step=12&show=expert&expert=3&over=1``. What is drawn stands in the text
of ``#state`` and in ``body[data-drawn]``, with the FNV-1a checksum of the map's RGBA bytes.
"""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Which experts work where: {{ title }}</title>
<style>
:root{--ink:#1c2330;--quiet:#5b6573;--line:#d5dae2;--blue:#2563a8;--orange:#b45309}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:1.6em auto;max-width:1120px;padding:0 1em;color:var(--ink);
background:#fff}
h1{font-size:1.5em;margin:0 0 .1em} h2{font-size:1.1em;margin:1.6em 0 .3em} p{max-width:56em;margin:.4em 0}
.quiet{color:var(--quiet)} .prompt{font-size:1.15em;margin-bottom:.8em}
.controls{position:sticky;top:0;background:#fff;border-bottom:1px solid var(--line);padding:.5em 0;z-index:2;
display:grid;grid-template-columns:1fr 1fr;gap:.3em 2.5em}
.slider{display:grid;grid-template-columns:3.2em 1fr 15.5em;gap:.8em;align-items:center}
.slider output{font-variant-numeric:tabular-nums} input[type=range]{width:100%;accent-color:var(--blue)}
.row{display:flex;flex-wrap:wrap;gap:.4em 1.4em;align-items:center}
button,select{font:inherit;color:var(--ink);background:#f5f6f8;border:1px solid #aab2bd;border-radius:6px;
padding:.2em .8em}
button:hover{background:#e8ecf2} :focus-visible{outline:3px solid #7fb0e6;outline-offset:1px}
#state{font-weight:600;margin:.7em 0 .1em} #note{color:var(--orange);min-height:1.5em;margin:0}
.panels{display:grid;grid-template-columns:repeat(2,minmax(0,340px)) minmax(0,1fr);gap:22px;align-items:start}
figure{margin:0} figcaption{font-size:13px;color:var(--quiet);margin-top:.4em}
.frame{position:relative;border:1px solid #aab2bd;line-height:0;background:#fff}
.frame img,.frame canvas{width:100%;height:auto;image-rendering:pixelated;display:block}
.frame img.smooth{image-rendering:auto}
.stack canvas{position:absolute;inset:0;height:100%} .stack img{visibility:hidden} .stack.over img{visibility:visible}
.stack.over.counts canvas{opacity:.62}
.legend{display:flex;flex-wrap:wrap;gap:2px;margin:.5em 0 0}
.legend span{min-width:1.9em;height:1.7em;line-height:1.7em;text-align:center;border:1px solid #aab2bd;font-size:12px;
padding:0 .3em}
table{border-collapse:collapse;width:100%;font-size:13.5px} td,th{padding:.18em 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid var(--line);padding-top:.5em} tr:first-child th{padding-top:0}
td+td,th+th{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-left:1em}
.thumbs{display:flex;flex-wrap:wrap;gap:10px} .thumbs button{padding:4px;font-size:12px;line-height:1.3;background:#fff}
.thumbs canvas{width:84px;height:auto;image-rendering:pixelated;display:block;border:1px solid #c9ced6;
margin-bottom:2px}
.thumbs button[aria-current=true]{border-color:var(--blue);box-shadow:0 0 0 2px var(--blue);font-weight:600}
svg{width:100%;height:auto;display:block;max-width:900px} svg text{font:11px system-ui,sans-serif;fill:var(--quiet)}
.key{display:inline-block;width:1.6em;height:.25em;vertical-align:middle;margin:0 .4em 0 1.2em}
@media(max-width:820px){.controls,.panels{grid-template-columns:1fr}.controls{position:static}}
</style></head><body>
<h1>Which experts work where</h1>
<p class="prompt">while the model draws “{{ prompt }}”</p>
<p>The picture is made of {{ tokens }} small tiles, called tokens: {{ rows }} rows of {{ columns }}. The model has {{
layer_count }} mixture-of-experts layers. In each of them {{ experts }} experts choose the tokens they work on; one
more expert, shared, works on all. Drawing starts from noise (noise level 1) and takes {{ steps }} steps. Move the
sliders, or press play.</p>
<noscript><p><b>This page draws its maps with JavaScript, which is switched off here.</b></p></noscript>
<div class="controls" id="controls">
<div class="slider"><label for="layer">Layer</label><input type="range" id="layer" min="0" value="0">
<output id="layer-name" for="layer"></output></div>
<div class="slider"><label for="step">Step</label><input type="range" id="step" min="0" value="0">
<output id="step-name" for="step"></output></div>
<div class="row"><label><input type="radio" name="show" value="counts" checked> experts per token</label>
<label id="one"><input type="radio" name="show" value="expert"> one expert:</label>
<select id="expert" aria-label="which expert"></select></div>
<div class="row"><button id="play" type="button" aria-pressed="false">Play</button>
<label><input type="checkbox" id="over"> lay the map over the picture</label></div>
</div>
<p id="state" role="status" aria-live="polite"></p><p id="note"></p>
<div class="panels">
<figure><div class="frame"><img id="picture" alt=""></div>
<figcaption>The finished picture as the model foresees it in this step.</figcaption></figure>
<figure><div class="frame stack" id="stack"><img id="under" alt=""><canvas id="map" role="img"></canvas></div>
<div class="legend" id="legend" aria-hidden="true"></div>
<figcaption><span id="map-caption"></span> <span id="pointed"></span></figcaption></figure>
<table><tbody id="figures"></tbody></table>
</div>
<h2>All layers in this step</h2><div class="thumbs" id="thumbs"></div>
<h2 id="chart-title"></h2>
<p class="quiet"><span class="key" style="background:#2563a8;margin-left:0"></span>tokens that no expert took
<span class="key" style="background:#b45309"></span>choices kept from the step before
<span class="key" style="background:repeating-linear-gradient(90deg,#b45309 0 4px,#fff 4px 8px)"></span>the same by
chance</p>
<svg id="chart" viewBox="0 0 900 190" role="img" aria-labelledby="chart-title"></svg>
<h2>How to read this</h2>
<p>Every expert takes equally many tokens, so a token may be taken by several experts or by none. Tokens that none
took are left to the shared expert alone. Where the dark tiles follow the objects of the picture, the experts look at
content; where they stay the same whatever is drawn, they look at position.</p>
<p>How evenly an expert works over the image, or over time, is an entropy: 1 means everywhere (at all times) alike, 0
in one place (at one time) alone. Logits are the router's raw scores; the more of their variance the noise level
explains, the less they look at the picture. A dash stands where a figure is not defined, for example where no step
has a low noise level.</p>
<p class="quiet">{{ settings }}</p>
<script type="application/json" id="data">{{ data }}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), [H, W] = data.grid, S = H * W, E = data.experts;
const stored = data.steps.map((s, i) => i), detailed = stored.filter(i => data.steps[i].experts !== null);
const state = {layer: 0, step: 0, show: "counts", expert: 0, over: false};
const blobs = new Map();  // "counts 3" -> bytes of that step, inflated once
let drawing = 0, timer = null, shown = null;

function bytes(kind, step) {
  const key = kind + " " + step;
  if (!blobs.has(key)) {
    const raw = Uint8Array.from(atob(data.steps[step][kind]), c => c.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    blobs.set(key, new Response(stream).arrayBuffer().then(b => new Uint8Array(b)));
    if (blobs.size > 40) blobs.delete(blobs.keys().next().value);  // a page stays small
  }
  return blobs.get(key);
}
function valuesOf(raw, layer) {  // one number per token: how many experts, or 1 where the expert took it
  if (state.show === "counts") return raw.subarray(layer * S, (layer + 1) * S);
  const out = new Uint8Array(S), first = (layer * E + state.expert) * S;
  for (let i = 0; i < S; i++) out[i] = raw[(first + i) >> 3] >> (7 - ((first + i) & 7)) & 1;
  return out;
}
function colour(value, over) {
  if (state.show === "counts") return [...data.palette[value], 255];
  if (over) return value ? [0, 0, 0, 0] : [16, 20, 30, 205];  // a spotlight on what the expert took
  return value ? [...data.taken, 255] : [255, 255, 255, 255];
}
function paint(canvas, values, over) {
  canvas.width = W; canvas.height = H;
  const context = canvas.getContext("2d"), image = context.createImageData(W, H);
  values.forEach((value, i) => image.data.set(colour(value, over), 4 * i));
  context.putImageData(image, 0, 0);
  return image.data;
}
function checksum(rgba) {
  let hash = 0x811c9dc5;
  for (const byte of rgba) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash.toString(16).padStart(8, "0");
}
const percent = x => x === null ? "–" : (100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0) + " %";
const decimal = x => x === null ? "–" : x.toFixed(2);
const steps = () => state.show === "counts" ? stored : detailed;
function nameOf(step) {
  const {number, sigma} = data.steps[step];
  return `step ${number} of ${data.total_steps}, noise level ${decimal(sigma)}`;
}

function read() {  // the hash -> state; what cannot be shown is said, not guessed at
  const notes = [], asked = new URLSearchParams(location.hash.slice(1));
  const one = (name, list, what) => {
    if (!asked.has(name)) return;
    const at = list.indexOf(Number(asked.get(name)));
    if (asked.get(name) !== "" && at >= 0) state[name] = at;
    else notes.push(`${name}=${asked.get(name)}: ${what}`);
  };
  one("layer", data.layers, "no such layer with experts here.");
  one("step", data.steps.map(s => s.number), "this page does not hold that step.");
  one("expert", [...Array(E).keys()], "no such expert.");
  if (asked.has("show")) {
    const wanted = asked.get("show");
    if (wanted === "counts" || wanted === "expert" && detailed.length) state.show = wanted;
    else notes.push(`show=${wanted}: cannot be shown here.`);
  }
  if (asked.has("over")) state.over = asked.get("over") === "1";
  $("note").textContent = notes.join(" ");
}
function keepStored() {  // single experts are stored for some steps only: go to the nearest of them
  if (steps().includes(state.step)) return;
  const from = state.step;
  state.step = steps().reduce((a, b) => Math.abs(b - from) < Math.abs(a - from) ? b : a);
  const missed = data.steps[from].number;
  $("note").textContent += ` Step ${missed} is stored without single experts; this is the nearest with them.`;
}
function hash() {
  const parts = {layer: data.layers[state.layer], step: data.steps[state.step].number, show: state.show};
  if (state.show === "expert") parts.expert = state.expert;
  if (state.over) parts.over = 1;
  return new URLSearchParams(parts).toString();
}
async function draw() {
  keepStored();
  const turn = ++drawing, {layer, step, show} = state, kind = show === "counts" ? "counts" : "experts";
  const raw = await bytes(kind, step);
  if (turn !== drawing) return;  // a later state is on its way
  const values = valuesOf(raw, layer), sum = checksum(paint($("map"), values, state.over));
  shown = values;
  const what = show === "counts" ? "experts per token" : `expert ${state.expert}`;
  const text = `Layer ${data.layers[layer]}, ${nameOf(step)}: ${what}`;
  $("state").textContent = text;
  const none = percent(data.figures[layer][step].none);
  $("map").setAttribute("aria-label", `${text}. ${none} of the tokens taken by no expert.`);
  for (const id of ["picture", "under"]) {
    $(id).src = data.steps[step].picture; $(id).className = data.smooth ? "smooth" : "";
  }
  $("picture").alt = `picture foreseen in ${nameOf(step)}`;
  $("map-caption").textContent = show === "counts" ? "How many experts took each token; white: none."
    : `What expert ${state.expert} took${state.over ? "; the rest is darkened." : " is blue."}`;
  $("stack").className = `frame stack ${show}${state.over ? " over" : ""}`;
  $("legend").style.display = show === "counts" ? "" : "none";
  controls(); figures(); chart(); thumbs(raw); point(null);
  document.body.dataset.drawn = `${hash()}&checksum=${sum}`;
}
function controls() {
  $("layer").max = data.layers.length - 1; $("layer").value = state.layer;
  $("layer-name").textContent = `${data.layers[state.layer]} (of ${data.layers[0]} to ${data.layers.at(-1)})`;
  $("layer").setAttribute("aria-valuetext", `layer ${data.layers[state.layer]}`);
  $("step").max = steps().length - 1; $("step").value = steps().indexOf(state.step);
  $("step-name").textContent = nameOf(state.step).replace("step ", "");
  $("step").setAttribute("aria-valuetext", nameOf(state.step));
  document.querySelectorAll("[name=show]").forEach(r => { r.checked = r.value === state.show; });
  $("expert").value = state.expert; $("over").checked = state.over;
}
function rows(target, list) {
  target.replaceChildren(...list.map(([name, value]) => {
    const row = document.createElement("tr"), head = value === undefined;
    for (const text of head ? [name] : [name, value]) {
      const cell = row.appendChild(document.createElement(head ? "th" : "td"));
      cell.textContent = text; if (head) cell.colSpan = 2;
    }
    return row;
  }));
}
function figures() {
  const f = data.figures[state.layer][state.step], whole = data.whole[state.layer], chance = data.chance[state.layer];
  const bound = f.most < 1 ? `${decimal(f.most)} at most with so few tokens` : "1 = everywhere alike";
  rows($("figures"), [
    ["This layer in this step"],
    ["tokens that no expert took", percent(f.none)], ["taken by exactly one", percent(f.one)],
    ["experts per token, on average", decimal(f.mean)],
    ["tokens that each expert took", `${f.rows} of ${S}`],
    [`choices kept from the step before (by chance ${percent(chance)})`, percent(f.kept)],
    [`evenness of an expert over the image (${bound})`, decimal(f.space)],
    ["least weight of an expert (1 = as much as the others)", decimal(f.least)],
    ["standard deviation of the logits", decimal(f.spread)],
    ["This layer over all steps"],
    ["evenness of an expert over time (1 = at all times alike)", decimal(whole.time)],
    ["logit variance explained by the noise level", percent(whole.explained)],
    ["logit deviation, low noise / high noise", decimal(whole.ratio)],
    ["experts without work", `${whole.dead} of ${E}`],
  ]);
}
function thumbs(raw) {
  const box = $("thumbs");
  if (!box.children.length) data.layers.forEach((number, layer) => {
    const button = box.appendChild(document.createElement("button"));
    button.type = "button"; button.append(document.createElement("canvas"), `layer ${number}`);
    button.onclick = () => change({layer});
  });
  data.layers.forEach((_, layer) => {
    paint(box.children[layer].firstChild, valuesOf(raw, layer), false);
    box.children[layer].setAttribute("aria-current", layer === state.layer);
  });
}
function chart() {
  const L = 44, R = 890, T = 10, B = 150, n = data.steps.length, lines = data.figures[state.layer];
  const x = i => n > 1 ? L + (R - L) * i / (n - 1) : (L + R) / 2, y = v => B - (B - T) * v;
  const make = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const line = (key, stroke) => make("polyline", {fill: "none", stroke, "stroke-width": 2, points: lines.map(
    (f, i) => f[key] === null ? "" : `${x(i).toFixed(1)},${y(f[key]).toFixed(1)}`).join(" ")});
  const dot = (key, fill) => lines[state.step][key] === null ? [] :
    [make("circle", {cx: x(state.step), cy: y(lines[state.step][key]), r: 4, fill})];
  const ticks = [0, 0.5, 1].flatMap(v => [make("line", {x1: L, x2: R, y1: y(v), y2: y(v), stroke: "#e6e9ee"}),
    make("text", {x: L - 6, y: y(v) + 4, "text-anchor": "end"}, 100 * v + " %")]);
  const labels = [0, (n - 1) >> 1, n - 1].filter((i, k, all) => all.indexOf(i) === k).map(i => make("text",
    {x: x(i), y: B + 18, "text-anchor": i === 0 && n > 1 ? "start" : i === n - 1 && n > 1 ? "end" : "middle"},
    `step ${data.steps[i].number} (noise ${decimal(data.steps[i].sigma)})`));
  $("chart-title").textContent = `Layer ${data.layers[state.layer]} over the steps of the drawing`;
  $("chart").replaceChildren(...ticks, ...labels,
    make("line", {x1: x(state.step), x2: x(state.step), y1: T, y2: B, stroke: "#5b6573"}),
    make("line", {x1: L, x2: R, y1: y(data.chance[state.layer]), y2: y(data.chance[state.layer]), stroke: "#b45309",
      "stroke-dasharray": "4 4"}),
    line("none", "#2563a8"), line("kept", "#b45309"), ...dot("none", "#2563a8"), ...dot("kept", "#b45309"));
}
function point(event) {
  if (!event || !shown) { $("pointed").textContent = ""; return; }
  const box = $("map").getBoundingClientRect();
  const column = Math.min(W - 1, Math.floor((event.clientX - box.left) / box.width * W));
  const row = Math.min(H - 1, Math.floor((event.clientY - box.top) / box.height * H));
  const value = shown[row * W + column], plural = value === 1 ? "" : "s";
  const what = state.show === "expert" ? (value ? "taken" : "not taken") : `${value} expert${plural}`;
  $("pointed").textContent = `Row ${row + 1}, column ${column + 1}: ${what}.`;
}
function change(part) {
  $("note").textContent = "";
  Object.assign(state, part);
  keepStored();
  history.replaceState(null, "", "#" + hash());
  draw();
}
function play(on) {
  clearInterval(timer);
  const next = () => steps()[(steps().indexOf(state.step) + 1) % steps().length];
  timer = on ? setInterval(() => change({step: next()}), 350) : null;
  $("play").textContent = on ? "Pause" : "Play"; $("play").setAttribute("aria-pressed", on);
  $("state").setAttribute("aria-live", on ? "off" : "polite");
}
function begin() {
  if (!("DecompressionStream" in window)) {
    $("note").textContent = "This browser is too old to unpack the maps; use one from 2023 or later.";
    return;
  }
  for (let i = 0; i < E; i++) $("expert").append(new Option(`expert ${i}`, i));
  data.palette.forEach(([r, g, b], i) => {
    const box = $("legend").appendChild(document.createElement("span"));
    box.textContent = i;
    box.style.background = `rgb(${r},${g},${b})`; box.style.color = r + g + b < 380 ? "#fff" : "#1c2330";
  });
  if (!detailed.length) document.querySelectorAll("#one input, #expert").forEach(e => { e.disabled = true; });
  $("layer").oninput = e => change({layer: Number(e.target.value)});
  $("step").oninput = e => { play(false); change({step: steps()[Number(e.target.value)]}); };
  $("expert").onchange = e => change({expert: Number(e.target.value), show: "expert"});
  $("over").onchange = e => change({over: e.target.checked});
  document.querySelectorAll("[name=show]").forEach(r => { r.onchange = () => change({show: r.value}); });
  $("play").onclick = () => play(timer === null);
  $("map").onmousemove = point; $("map").onmouseleave = () => point(null);
  addEventListener("hashchange", () => { read(); draw(); });
  read(); draw();
}
begin();
</script>
</body></html>
"""
