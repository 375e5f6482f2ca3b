"""Charts, tables of bars and the words around them: the parts of the page that show what was counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_nucleus.data.buckets import BUCKETS, ratio
from megatron_nucleus.data.curation.captions import LENGTH_CLASSES, MEDIUM_WORDS, SHORT_WORDS
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.report import reasons
from megatron_nucleus.data.curation.report.charts import Mark, histogram, number
from megatron_nucleus.data.curation.report.choose import EXACT
from megatron_nucleus.data.curation.report.funnel import Step
from megatron_nucleus.data.curation.report.gather import CLUSTER_SIZES, Tally
from megatron_nucleus.data.curation.report.histograms import Histogram, Names
from megatron_nucleus.data.curation.stages.score import ScoreConfig
from megatron_nucleus.data.curation.tiers import TiersConfig
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS

_MAX_NAMES = 12  # licences, sources and the like that are listed; own choice
_RELATIONS = {
    EXACT: "the same bytes",
    "pixel_duplicate": "the same pixels in another file",
    "near_duplicate": "almost the same picture",
}
# column: title, what it says, unit
_MEASURES = {
    "laplacian_variance": (
        "Sharpness",
        "How strongly neighbouring pixels differ (variance of the Laplacian). Blurred pictures lie on the left.",
        "",
    ),
    "high_frequency_share": (
        "Fine detail",
        "Which part of the contrast lies in fine detail. Blurred pictures lie on the left.",
        "",
    ),
    "luma_std": ("Contrast", "How much the brightness varies, of 0 to 127.5. A blank picture lies at 0.", ""),
    "chroma_std": ("Colour", "How much the colour varies. A black-and-white picture lies at 0.", ""),
    "dominant_colour_share": (
        "Most frequent colour",
        "Share of a picture's pixels that have its most frequent colour. An empty picture lies at 1.",
        "",
    ),
}


_LIMITED_AS = {"dominant_colour_share": "dominant_share"}  # column: what follows min_ or max_ in its knob


class Facts(NamedTuple):
    """What the page says, besides what was counted. packed: `pack.PackedSet` or None. parts: of the input."""

    source: str
    settings: Any
    lines: tuple[Line, ...]
    counts: Mapping[str, Any]
    results: Sequence[Any]
    steps: list[Step]
    packed: Any
    parts: int


def plural(number: int, word: str) -> str:
    """A number and its noun."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _chart(
    title: str, text: str, counted: Histogram, unit: str = "", marks: Sequence[Mark] = ()
) -> dict[str, Any]:
    drawn = histogram(title, counted, unit, marks)
    bars = drawn.bars
    both = any(bar.other for bar in bars)
    return {"title": title, "text": text, "unit": unit, "svg": drawn.svg, "bars": bars, "both": both}


def _bars(
    title: str, counted: Sequence[tuple[str, int]], text: str = "", notes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    largest = max((n for _, n in counted), default=0)
    rows = [
        {
            "name": name,
            "note": (notes or {}).get(name, ""),
            "number": n,
            "percent": f"{100 * n / max(largest, 1):.2f}",
        }
        for name, n in counted
    ]
    return {"title": title, "text": text, "rows": rows}


def charts(facts: Facts, tally: Tally) -> dict[str, Any]:
    """The charts of every section about the kept images."""
    counts = facts.counts
    words_text = f"Up to {SHORT_WORDS} words are short, up to {MEDIUM_WORDS} medium, more detailed."
    word_marks = [Mark(SHORT_WORDS + 1, "medium"), Mark(MEDIUM_WORDS + 1, "detailed")]
    captions = [_chart("Words per caption", words_text, tally.words, "words", word_marks)]
    if tally.alignment is not None:
        text = "How well a caption fits its picture, where a scorer has measured it: the higher, the better."
        captions.append(_chart("Fit of captions", text, tally.alignment, "", _gate_marks(facts.lines)))
    return {
        "sizes": _size_charts(facts, tally),
        "buckets": _bucket_bars(facts),
        "quality": [*_score_charts(facts, tally), *_measure_charts(facts, tally)],
        "captions": captions,
        "caption_bars": _caption_bars(facts, tally),
        "origin": [
            _bars("Licences", tally.licences.largest(_MAX_NAMES), "Of the kept images, as far as known."),
            _bars("Notes", list(counts["notes"].items()), _note_text(counts["notes"]), reasons.NOTES),
        ],
    }


def _note_text(notes: Mapping[str, int]) -> str:
    return "Harmless oddities, of all images that came in." if notes else "No harmless oddities were noted."


def _size_charts(facts: Facts, tally: Tally) -> list[dict[str, Any]]:
    limits = _limits("side_px", facts.lines)
    side = _chart("Shortest side", "In pixels, as displayed.", tally.side_px, "px", limits[:1])
    text = (
        "Width over height: 1 is square, below 1 upright, above 1 wide. Dashed lines are the shapes used in "
        "training; every image is cropped to the nearest."
    )
    marks = [Mark(ratio(bucket), f"{ratio(bucket):.2f}") for bucket in BUCKETS]
    return [side, _chart("Aspect ratio", text, tally.aspect, "", marks)]


def _bucket_bars(facts: Facts) -> dict[str, Any]:
    numbers: dict[str, int] = {}
    for packed in facts.packed.shards:
        numbers[packed.shard.bucket] = numbers.get(packed.shard.bucket, 0) + packed.shard.samples
    notes = {
        large: f"with {', '.join(small for small, into in facts.packed.moved.items() if into == large)}"
        for large in facts.packed.moved.values()
    }
    least = facts.settings.curation.min_bucket_images
    text = (
        "Images per shape, width x height in pixels of the 1024 class. Shapes with fewer than "
        f"{plural(least, 'image')} join the nearest."
    )
    return _bars("Aspect buckets", list(numbers.items()), text, notes)


def _score_charts(facts: Facts, tally: Tally) -> list[dict[str, Any]]:
    charts = []
    for scorer, counted in tally.scores.items():
        mean = counted.mean()
        who = ", ".join(name for name, _ in tally.revisions.get(scorer, Names()).largest(3))
        average = "" if mean is None else f" Mean of the kept images: {number(mean)}."
        text = f"Given by {who}.{average}"
        charts.append(_chart(f"Score: {scorer}", text, counted, "", _score_marks(scorer, facts.lines)))
    return charts


def _score_marks(scorer: str, lines: Sequence[Line]) -> list[Mark]:
    marks = []
    for line in lines:
        _, settings = line.load()
        if isinstance(settings, ScoreConfig) and scorer == (settings.metric or settings.kind):
            named = zip(("min", "max"), settings.limits, strict=True)
            marks += [Mark(value, name) for name, value in named if value is not None]
        if (
            isinstance(settings, TiersConfig)
            and settings.tier_by == "thresholds"
            and scorer == settings.tier_scorer
        ):
            marks += [Mark(edge, tier) for edge, tier in zip(settings.tier_edges, TIERS, strict=True)]
    return marks


def _measure_charts(facts: Facts, tally: Tally) -> list[dict[str, Any]]:
    charts = []
    for column, counted in tally.measures.items():
        words = column.replace("_", " ")
        title, text, unit = _MEASURES.get(
            column, (words.capitalize(), f"Column {column}, from a stage of your own.", "")
        )
        charts.append(_chart(title, text, counted, unit, _limits(column, facts.lines)))
    return charts


def _limits(column: str, lines: Sequence[Line]) -> list[Mark]:
    """The knobs min_COLUMN and max_COLUMN of the recipe's stages."""
    column, marks = _LIMITED_AS.get(column, column), []
    for line in lines:
        _, settings = line.load()
        for word in ("min", "max"):
            value = getattr(settings, f"{word}_{column}", None)
            if isinstance(value, (int, float)):
                marks.append(Mark(float(value), f"{word} {number(value)}"))
    return marks


def _gate_marks(lines: Sequence[Line]) -> list[Mark]:
    """Where the caption gate opens, when the recipe has one."""
    for line in lines:
        _, settings = line.load()
        low, high = (getattr(settings, name, None) for name in ("synthesise_below", "keep_above"))
        if low is not None and high is not None:
            return [Mark(low, "refine"), Mark(high, "keep")]
    return []


def _caption_bars(facts: Facts, tally: Tally) -> list[dict[str, Any]]:
    per_image = {n: tally.captions[n] for n in sorted(tally.captions) if n < 6}
    more = sum(number for n, number in tally.captions.items() if n >= 6)
    rows = [(str(n), number) for n, number in per_image.items()] + ([("6 and more", more)] if more else [])
    classes = {name: facts.counts["captions"].get(name, 0) for name in LENGTH_CLASSES}
    out = [
        _bars("Captions by length", list(classes.items())),
        _bars("Captions per image", rows),
        _bars("Where captions come from", tally.sources.largest(_MAX_NAMES)),
    ]
    if tally.gates.counts:
        text = "What the caption gate decided for each kept image."
        tokens_in, tokens_out, cost = tally.cost.tolist()
        if tokens_in or tokens_out:
            text += f" New captions took {tokens_in:,.0f} tokens in and {tokens_out:,.0f} out, and cost {cost:.2f}."
        out.append(_bars("Caption gate", tally.gates.largest(_MAX_NAMES), text))
    return out


def caption_sentence(facts: Facts, tally: Tally) -> str:
    """How many captions there are, and how long they are."""
    captions, images = sum(facts.counts["captions"].values()), facts.counts["kept"]
    words = tally.words.mean()
    average = "" if words is None else f", {words:.1f} words on average"
    whose = f"{plural(captions, 'caption')} of {plural(images, 'kept image')}"
    return f"{whose}: {captions / images:.2f} per image{average}."


def heat(tally: Tally) -> dict[str, Any] | None:
    """The table of tiers and episode buckets; None where no image has either."""
    if set(tally.cells) <= {(None, None)}:
        return None
    tiers, columns = (
        [*names, *([None] if any(cell[place] is None for cell in tally.cells) else [])]
        for place, names in enumerate((TIERS, EPISODE_BUCKETS))
    )
    most = max(tally.cells.values())
    rows = []
    for tier in tiers:
        numbers = [tally.cells[tier, column] for column in columns]
        cells = [{"number": n, "alpha": f"{0.07 + 0.5 * n / most:.3f}"} for n in numbers]
        rows.append({"name": tier or "none", "cells": cells, "total": sum(numbers)})
    sums = [sum(tally.cells[tier, column] for tier in tiers) for column in columns]
    rows.append({"name": "all", "cells": [{"number": n, "alpha": "0"} for n in sums], "total": sum(sums)})
    return {"columns": [column or "none" for column in columns], "rows": rows}


def duplicates(tally: Tally, clusters: Sequence[Any]) -> dict[str, Any] | None:
    """What is said of copies; None where there are none. clusters: those that are shown."""
    kept, copies = sum(tally.clusters.values()), sum(tally.relations.values())
    if not kept:
        return None
    relations = [
        (r, tally.relations[r]) for r in sorted(tally.relations, key=lambda r: (-tally.relations[r], str(r)))
    ]
    have, stand = ("has", "stands") if kept == 1 else ("have", "stand")
    return {
        "sentence": (
            f"{plural(kept, 'kept image')} {have} copies, and {stand} for {plural(copies, 'image')} that "
            f"{'was' if copies == 1 else 'were'} not kept. The captions and the origin of all copies went to the "
            "kept image."
        ),
        "charts": [
            _bars("Images per cluster", [(n, tally.clusters[n]) for n in CLUSTER_SIZES if tally.clusters[n]]),
            _bars("Kinds of copies", [(str(r), n) for r, n in relations], notes=_RELATIONS),
        ],
        "clusters": clusters,
        "which": "the largest clusters first, then those whose copies differ most",
    }
