"""``report.html``: what came in, what was kept, what was not and why, with pictures. One file, no network."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from pathlib import Path

import jinja2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from megatron_nucleus.data import buckets, images
from megatron_nucleus.data.batching import BucketSize
from megatron_nucleus.data.bucket_report import CROP_LABELS, CropTally
from megatron_nucleus.data.curation import pack, readers
from megatron_nucleus.data.curation.dedup import Decisions
from megatron_nucleus.data.curation.filters import CurationConfig
from megatron_nucleus.utils.files import write_atomic

KEPT_EXAMPLES, EXAMPLES_PER_REASON = 48, 8
THUMBNAIL_PX = 112
_PUBLISHED_TOKEN_PX = 16  # VAE stride 8 x patch 2
_SIDE_EDGES_PX = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 1 << 30)
_NEVER_DECODE = frozenset({"decoder_crash", "decompression_bomb", "damaged_tar", "file_too_large"})

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Curation report</title>
<style>
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#1c2330}
h1{font-size:1.5em} h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #d5dae2}
table{border-collapse:collapse} td,th{padding:.25em .9em .25em 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{background:#5b8def;height:.8em;display:inline-block;min-width:1px}.bar.out{background:#d9822b}
.sheet{display:flex;flex-wrap:wrap;gap:10px}
.sheet figure{margin:0;width:{{ thumbnail_px }}px;font-size:11px;overflow-wrap:anywhere}
.sheet figcaption{max-height:5.8em;overflow:hidden}
.none{width:100%;height:{{ thumbnail_px * 2 // 3 }}px;background:#eceff4;display:flex;align-items:center;
justify-content:center;color:#7a8499}
small{color:#667}
</style></head><body>
<h1>Curation report</h1>
<p><b>{{ counts.seen }}</b> items seen in <code>{{ source }}</code>, <b>{{ counts.kept }}</b> kept,
<b>{{ rejected }}</b> rejected (policy), <b>{{ quarantined }}</b> quarantined (damaged or not usable).
<br><small>seen = kept + rejected + quarantined. Every item that was not kept is in <code>quarantine/</code> with
its reason and a reference to its bytes; nothing was deleted. Also: {{ counts.ignored_files }} files ignored
(hidden, or records of a downloader), {{ counts.captions_without_image }} caption files without an image.</small></p>
{% if not counts.kept %}<p><b>Nothing was kept, so no data set was made.</b></p>{% endif %}
<h2>Funnel</h2>
<table><tr><th>stage</th><th>verdict</th><th>reason</th><th class="n">items</th><th class="n">left</th><th></th></tr>
<tr><td></td><td>seen</td><td></td><td></td><td class="n">{{ counts.seen }}</td>
<td><span class="bar" style="width:320px"></span></td></tr>
{% for row in funnel %}<tr><td>{{ row.stage }}</td><td>{{ row.verdict }}</td><td>{{ row.reason }}</td>
<td class="n">-{{ row.number }}</td><td class="n">{{ row.left }}</td>
<td><span class="bar" style="width:{{ row.width }}px"></span><span class="bar out" style="width:{{ row.out }}px">
</span></td></tr>
{% endfor %}</table>
{% for title, table in tables %}{% if table %}<h2>{{ title }}</h2>
<table>{% for name, number, width in table %}<tr><td>{{ name }}</td><td class="n">{{ number }}</td>
<td><span class="bar" style="width:{{ width }}px"></span></td></tr>
{% endfor %}</table>{% endif %}{% endfor %}
{% if fits %}<h2>How the images fit their buckets</h2>
<table><tr><th>bucket</th>{% for name in ("images", "smaller than it", "cropped, mean", "at most") %}
<th class="n">{{ name }}</th>{% endfor %}{% for label in crop_labels %}<th class="n">{{ label }}</th>{% endfor %}
<th>merged from</th></tr>
{% for row in fits %}<tr><td>{{ row.bucket }}</td><td class="n">{{ row.images }}</td><td class="n">{{ row.enlarged }}
</td><td class="n">{{ "%.1f %%" | format(100 * row.cropped_mean_frac) }}</td>
<td class="n">{{ "%.1f %%" | format(100 * row.cropped_max_frac) }}</td>
{% for number in row.cropped_histogram.values() %}<td class="n">{{ number }}</td>{% endfor %}
<td>{{ row.merged_from | join(", ") }}</td></tr>
{% endfor %}</table>
<p><small>At the sizes of the 1024 px class. Cropped: share of an image's area outside the centre crop; the columns
after it count images by that share. Images are never distorted; a smaller one is enlarged.</small></p>{% endif %}
{% if moved %}<p>Buckets with fewer than {{ config.min_bucket_images }} images joined the nearest one:
{% for small, large in moved.items() %}{{ small }} &rarr; {{ large }}{{ ", " if not loop.last }}{% endfor %}.</p>
{% endif %}
<h2>Kept</h2><div class="sheet">{% for e in kept %}{{ figure(e) }}{% endfor %}</div>
{% for reason, examples in dropped.items() %}<h2>Not kept: {{ reason }}</h2>
<div class="sheet">{% for e in examples %}{{ figure(e) }}{% endfor %}</div>{% endfor %}
<h2>Settings</h2><table>{% for name, value in config_rows %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body></html>
"""
_FIGURE = """{% macro figure(e) %}<figure>{% if e.picture %}<img src="data:image/jpeg;base64,{{ e.picture }}"
alt="">{% else %}<div class="none">no picture</div>{% endif %}
<figcaption><b>{{ e.name }}</b><br>{{ e.text }}</figcaption></figure>{% endmacro %}"""


def write(
    output: Path,
    source: Path,
    config: CurationConfig,
    counts: dict,
    bucket_counts: dict[str, int],
    moved: dict[str, str],
    inspected: Path,
    task_names: list[str],
    decisions: Decisions,
) -> None:
    """Write ``report.html`` from the counts and a few re-read examples (evenly spread, so always the same)."""
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(_FIGURE + _TEMPLATE)
    page = template.render(
        source=str(source).encode("utf-8", "backslashreplace").decode(),
        config=config,
        config_rows=dataclasses.asdict(config).items(),
        counts=counts,
        rejected=sum(counts["rejected"].values()),
        quarantined=sum(counts["quarantined"].values()),
        funnel=_funnel(counts),
        tables=[
            ("Shortest side of the kept images", _bars(_sides(decisions))),
            ("Aspect buckets", _bars(bucket_counts)),
            ("Captions by length", _bars(counts.get("captions", {}))),
            ("Captions by source", _bars(counts.get("caption_sources", {}))),
            ("Notes", _bars(counts["notes"])),
        ],
        fits=_fits(decisions, config, moved),
        crop_labels=CROP_LABELS,
        moved=moved,
        kept=_kept_examples(source, config, inspected, task_names, decisions),
        dropped=_dropped_examples(source, config, output / "quarantine"),
        thumbnail_px=THUMBNAIL_PX,
    )
    write_atomic(output / "report.html", page)


def _fits(decisions: Decisions, config: CurationConfig, moved: dict[str, str]) -> list[dict]:
    """Rows of `bucket_report.CropTally` over the kept images, at the published sizes."""
    if not decisions.keep.any():
        return []
    assigned, _ = pack.assign_buckets(decisions, config.min_bucket_images)
    sizes = {}
    for bucket in buckets.BUCKETS:
        width, height = map(int, bucket.split("x"))
        sizes[bucket] = BucketSize(width, height, width * height // _PUBLISHED_TOKEN_PX**2)
    tally = CropTally(sizes)
    for number, bucket in enumerate(buckets.BUCKETS):
        chosen = assigned == number
        tally.add(bucket, decisions.width_px[chosen], decisions.height_px[chosen])
    return tally.rows(moved)


def _funnel(counts: dict) -> list[dict]:
    rows, left, seen = [], counts["seen"], max(counts["seen"], 1)
    losses = [("inspect", "quarantined", r, n) for r, n in counts["quarantined"].items()]
    losses += [
        ("dedup" if r == "exact_duplicate" else "inspect", "rejected", r, n)
        for r, n in sorted(counts["rejected"].items(), key=lambda pair: pair[0] == "exact_duplicate")
    ]
    for stage, verdict, reason, number in losses:
        left -= number
        width, out = round(320 * left / seen), round(320 * number / seen)
        rows.append(
            {"stage": stage, "verdict": verdict, "reason": reason, "number": number, "left": left}
            | {"width": width, "out": out}
        )
    return rows


def _bars(numbers: dict[str, int]) -> list[tuple[str, int, int]]:
    largest = max(numbers.values(), default=1)
    return [(name, number, round(320 * number / max(largest, 1))) for name, number in numbers.items()]


def _sides(decisions: Decisions) -> dict[str, int]:
    short = np.minimum(decisions.width_px, decisions.height_px)[decisions.keep]
    numbers, _ = np.histogram(short, _SIDE_EDGES_PX)
    labels = [f"{low} to {high - 1} px" for low, high in itertools.pairwise(_SIDE_EDGES_PX)]
    labels[-1] = f"{_SIDE_EDGES_PX[-2]} px and more"
    return {label: int(n) for label, n in zip(labels, numbers, strict=True) if n}


def _kept_examples(
    source: Path, config: CurationConfig, inspected: Path, task_names: list[str], decisions: Decisions
) -> list[dict]:
    kept = np.flatnonzero(decisions.keep)
    if not len(kept):
        return []
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, min(KEPT_EXAMPLES, len(kept))).astype(int))]
    examples = []
    for position in chosen.tolist():
        name = task_names[int(decisions.task[position])]
        table = pq.read_table(inspected / f"{name}.parquet", partitioning=None)
        row = table.slice(int(decisions.row[position]), 1).to_pylist()[0]
        text = f"{row['width_px']} x {row['height_px']} px. {row['captions'][0]['text']}"
        examples.append(_example(source, config, row, text[:200]))
    return examples


def _dropped_examples(source: Path, config: CurationConfig, quarantine: Path) -> dict[str, list[dict]]:
    examples: dict[str, list[dict]] = {}
    for path in sorted(quarantine.glob("*.parquet")):
        table = pq.read_table(path, partitioning=None)
        reasons = np.array(table["reason"].to_pylist(), dtype=object)
        for reason in sorted(set(reasons)):
            found = examples.setdefault(reason, [])
            picked = np.flatnonzero(reasons == reason)[: EXAMPLES_PER_REASON - len(found)]
            for row in table.take(picked).to_pylist():
                found.append(_example(source, config, row, (row["detail"] or "")[:200]))
    return dict(sorted(examples.items()))


def _example(source: Path, config: CurationConfig, row: dict, text: str) -> dict:
    picture = None if row.get("reason") in _NEVER_DECODE else _thumbnail(source, config, row)
    return {"name": row["item"][-60:], "text": text, "picture": picture}


def _thumbnail(source: Path, config: CurationConfig, row: dict) -> str | None:
    """JPEG as base64, or None for what cannot be shown."""
    reference = readers.Reference(row["container"], row["offset"], row["length"])
    try:
        with images.quiet_decoding():
            payload = readers.read_reference(str(source), reference, config.max_file_bytes)
            picture = images.decode(payload, config.max_pixels, (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX)).image
    except images.UnusableImage:
        return None
    scale = THUMBNAIL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
