"""Charts of the page: SVG in the page's own colours, so that they follow its light and dark scheme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from megatron_nucleus.data.curation.report.histograms import Histogram

_WIDTH, _HEIGHT = (
    380,
    190,
)  # of the drawing; about the size at which it is shown, so that its text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 26, 24
_MAX_TICKS = 7


class Mark(NamedTuple):
    """A line across a chart, with a word above it."""

    value: float
    label: str


class Bar(NamedTuple):
    """A bin with images. label: its range."""

    label: str
    kept: int
    other: int


class Chart(NamedTuple):
    """A picture, and the same as numbers."""

    svg: Markup
    bars: list[Bar]


def histogram(title: str, counted: Histogram, unit: str = "", marks: Sequence[Mark] = ()) -> Chart:
    """A chart of a histogram, from its first to its last bin with images, and as far as the marks reach."""
    places = [(counted.place(mark.value), mark.label) for mark in marks]
    first, last = _window(counted, [place for place, _ in places if place is not None])
    edges = counted.edges[first : last + 1]
    kept, other = counted.kept[first:last].tolist(), counted.other[first:last].tolist()
    top = _round_up(max((k + o for k, o in zip(kept, other, strict=True)), default=0))
    labels = [_range(low, high, counted.whole, unit) for low, high in itertools.pairwise(edges)]
    lines = [(p - first, text) for p, text in places if p is not None]
    svg = _drawing(title, _ticks(counted, first, last), top, list(map(Bar, labels, kept, other)), lines)
    return Chart(svg, [bar for bar in map(Bar, labels, kept, other) if bar.kept or bar.other])


def number(value: float) -> str:
    """A value on an axis, in as few digits as it needs."""
    if abs(value) >= 10_000 and value == int(value):
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _window(counted: Histogram, places: Sequence[float]) -> tuple[int, int]:
    """First bin to draw and the one behind the last."""
    used = [int(n) for n in (counted.counts.sum(0) > 0).nonzero()[0]]
    low = [*used[:1], *(max(0, math.ceil(p) - 1) for p in places)]
    high = [*(n + 1 for n in used[-1:]), *(min(len(counted.kept), math.floor(p) + 1) for p in places)]
    return (min(low), max(high)) if low else (0, len(counted.kept))


def _range(low: float, high: float, whole: bool, unit: str) -> str:
    unit = f" {unit}" if unit else ""
    if math.isinf(low):
        return f"below {number(high)}{unit}"
    if math.isinf(high):
        return f"{number(low)}{unit} and more"
    if whole:
        return f"{int(low):,}{unit}" if high - low == 1 else f"{int(low):,} to {int(high) - 1:,}{unit}"
    return f"{number(low)} to {number(high)}{unit}"


def _round_up(value: int) -> int:
    """The next number that can be halved and read easily."""
    power = 10 ** max(0, len(str(max(value, 1))) - 1)
    return next(n * power for n in (1, 2, 3, 4, 5, 6, 8, 10) if n * power >= max(value, 1))


def _ticks(counted: Histogram, first: int, last: int) -> list[tuple[float, str]]:
    """(place in bins from the left, text) below the axis."""
    if counted.ticks:
        placed = [(counted.place(value), text) for value, text in counted.ticks.items()]
        found = [
            (place - first, text) for place, text in placed if place is not None and first <= place <= last
        ]
    else:
        edges = enumerate(counted.edges[first : last + 1].tolist())
        found = [(float(place), number(edge)) for place, edge in edges if math.isfinite(edge)]
    return found[:: max(1, math.ceil(len(found) / _MAX_TICKS))]


def _drawing(
    title: str, ticks: list[tuple[float, str]], top: int, bars: list[Bar], marks: list[tuple[float, str]]
) -> Markup:
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step, base = plot_w / max(len(bars), 1), _HEIGHT - _BOTTOM
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: the numbers are listed below">'
    ]
    for share in (0.5, 1.0):
        y = base - plot_h * share
        label = number(top * share) if top * share == int(top * share) else ""
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for n, bar in enumerate(bars):
        parts.append(_column(bar, _LEFT + n * step, step, base, plot_h / top))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for place, text in ticks:
        x = _LEFT + place * step
        anchor = "end" if x > _WIDTH - 24 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(
            f'<text x="{min(x, _WIDTH - 2):.1f}" y="{base + 16}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    parts += _marks(marks, step, base)
    return Markup("".join(parts) + "</svg>")


def _column(bar: Bar, x: float, step: float, base: float, scale: float) -> str:
    """One bar: kept images below, the others on top; a bin with images is always seen."""
    if not bar.kept and not bar.other:
        return ""
    heights = [max(n * scale, 1.2) if n else 0.0 for n in (bar.kept, bar.other)]
    gap = min(1.0, step / 8)
    text = f"{bar.label}: {bar.kept:,} kept" + (f", {bar.other:,} not kept" if bar.other else "")
    out, y = [f"<g><title>{escape(text)}</title>"], base
    for kind, height in zip(("kept", "lost"), heights, strict=True):
        if height:
            y -= height
            box = f'x="{x + gap / 2:.2f}" y="{y:.2f}" width="{step - gap:.2f}" height="{height:.2f}"'
            out.append(f'<rect class="{kind}" {box}/>')
    return "".join(out) + "</g>"


def _marks(marks: list[tuple[float, str]], step: float, base: float) -> list[str]:
    """Dashed lines with their words in two rows, so that neighbours do not collide."""
    out, ends = [], [-math.inf, -math.inf]
    for place, text in sorted(marks):
        x = _LEFT + place * step
        half = 3.1 * len(text)
        middle = min(max(x, half), _WIDTH - half)
        row = next((r for r in (0, 1) if middle - half > ends[r]), None)
        out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 2}" y2="{base}"/>')
        if row is not None:
            ends[row] = middle + half
            y = _TOP - 5 - 11 * row
            out.append(
                f'<text class="mark" x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'
            )
    return out
