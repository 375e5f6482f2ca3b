"""The funnel: how many images each stage let through, and what it held back and why. As rows, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, REJECTED, QUARANTINED = "#2563a8", "#e08a2e", "#b84a5a"
_INK, _QUIET = "#1c2330", "#5b6573"
_COLOURS = {"rejected": REJECTED, "quarantined": QUARANTINED}
_WORD_COLOURS = {"rejected": "#9a5508", "quarantined": "#9c3547"}  # darker, so that words can be read
_MEANING = {"rejected": "against the policy", "quarantined": "damaged"}
_DPI = 130
_WIDTH_IN, _HEAD_IN, _FOOT_IN, _ROW_IN, _LINE_IN = 9.6, 0.95, 0.85, 0.62, 0.21
_NAME_IN, _STREAM_IN, _TEXT_IN = 1.75, 3.9, 0.75  # widths: names, the whole stream, from there to the reasons
_MAX_REASONS = 5  # written beside a stage; the others in one line


class Loss(NamedTuple):
    """Images that a stage held back for one reason."""

    verdict: str
    reason: str
    images: int


class Step(NamedTuple):
    """One stage. arrived = kept + sum of the losses; seen: by the first stage."""

    name: str
    seen: int
    arrived: int
    kept: int
    losses: tuple[Loss, ...]

    def lost(self, verdict: str) -> int:
        """Images with this verdict."""
        return sum(loss.images for loss in self.losses if loss.verdict == verdict)


def steps_of(results: Sequence[Any]) -> list[Step]:
    """One step per stage, in order. results: `results.StageResult`, the first of them the list of items."""
    seen = results[0].counts["kept"]
    steps = []
    for result in results[1:]:
        losses = [
            Loss(verdict, reason, images)
            for verdict in ("rejected", "quarantined")
            for reason, images in result.counts[verdict].items()
        ]
        losses.sort(key=lambda loss: (-loss.images, loss.reason))
        steps.append(Step(result.name, seen, result.counts["in"], result.counts["kept"], tuple(losses)))
    return steps


def funnel_figure(results: Sequence[Any], counts: Mapping[str, Any]) -> Figure:
    """The funnel as a picture: one row per stage, a stream as wide as the images that are left.

    results: as in `steps_of`. counts: seen, kept, rejected and quarantined of the whole run.
    """
    from matplotlib.figure import Figure  # imported here: half a second that workers need not spend

    steps = steps_of(results)
    heights = [_height(step) for step in steps]
    total = _HEAD_IN + sum(heights) + _FOOT_IN
    figure = Figure(figsize=(_WIDTH_IN, total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH_IN), ylim=(total, 0))
    axes.axis("off")
    _head(axes, counts)
    y = _HEAD_IN
    for step, height in zip(steps, heights, strict=True):
        _row(axes, step, y, height)
        y += height
    _foot(axes, counts, y)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, without the name of the program that made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _width(images: int, seen: int) -> float:
    """Of a stream of so many images; what is there is seen."""
    return max(_STREAM_IN * images / max(seen, 1), 0.012 if images else 0.0)


def _height(step: Step) -> float:
    """Of a row: room for what turns off, as thick as it is wide, and for the words beside it."""
    lost = sum(_width(step.lost(verdict), step.seen) for verdict in _COLOURS)
    return max(_ROW_IN, lost + 0.28, _LINE_IN * (len(_notes(step)) + 1))


def _head(axes: Axes, counts: Mapping[str, Any]) -> None:
    left, words = _NAME_IN, _NAME_IN + _STREAM_IN + _TEXT_IN
    axes.text(left, 0.42, f"{counts['seen']:,} images came in", size=13, weight="bold", color=_INK)
    for y, (verdict, colour) in zip((0.28, 0.5), _COLOURS.items(), strict=True):
        axes.fill_between([words, words + 0.14], y - 0.07, y + 0.07, color=colour, linewidth=0)
        axes.text(words + 0.22, y, f"{verdict}: {_MEANING[verdict]}", size=9, color=_QUIET, va="center")
    width = _width(counts["seen"], counts["seen"])
    axes.fill_between([left, left + width], 0.62, _HEAD_IN, color=KEPT, linewidth=0)


def _row(axes: Axes, step: Step, y: float, height: float) -> None:
    """The stream goes on downwards; what the stage held back turns off to the right."""
    left, words, middle = _NAME_IN, _NAME_IN + _STREAM_IN + _TEXT_IN, y + height / 2
    after = _width(step.kept, step.seen)
    axes.fill_between([left, left + after], y - 0.005, y + height, color=KEPT, linewidth=0)
    widths = {verdict: _width(step.lost(verdict), step.seen) for verdict in _COLOURS}
    x, top = left + after + sum(widths.values()), middle - sum(widths.values()) / 2
    radius = min(0.12, top - y)
    for verdict, width in widths.items():  # from the outside inwards, and downwards
        if width:
            _branch(axes, (x - width, y - 0.005), width, top, radius, words - 0.14, _COLOURS[verdict])
            x, top, radius = x - width, top + width, radius + width
    axes.text(left - 0.15, middle, _cut(step.name, 22), size=10, color=_INK, ha="right", va="center")
    share = step.kept / step.seen if step.seen else 0.0
    inside = after > 1.3
    axes.text(
        left + (0.12 if inside else after + 0.1), middle, f"{step.kept:,}  ({100 * share:.1f} %)",
        size=9, color="white" if inside else _INK, weight="bold", va="center",
    )  # fmt: skip
    notes = _notes(step)
    for n, (images, text, colour) in enumerate(notes):
        at = middle + (n - (len(notes) - 1) / 2) * _LINE_IN
        axes.text(words + 0.45, at, images, size=9, color=colour, va="center", ha="right", weight="bold")
        axes.text(words + 0.55, at, _cut(text, 38), size=9, color=colour, va="center", parse_math=False)


def _branch(
    axes: Axes, start: tuple[float, float], width: float, top: float, inner: float, end: float, colour: str
) -> None:
    """A band that leaves the stream downwards at ``start`` (its left edge) and turns to the right, to ``end``.

    top: of the band where it lies. inner: radius of its bend.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x, y), bottom, outer = start, top + width, inner + width
    points = [
        (x, y), (x, bottom - outer), (x, bottom), (x + outer, bottom), (end, bottom),
        (end, top), (x + width + inner, top), (x + width, top), (x + width, top - inner), (x + width, y), (x, y),
    ]  # fmt: skip
    line, curve = Path.LINETO, Path.CURVE3
    codes = [Path.MOVETO, line, curve, curve, line, line, line, curve, curve, line, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(points, codes), facecolor=colour, linewidth=0))


def _cut(name: str, characters: int) -> str:
    words = name.replace("_", " ")
    return words if len(words) <= characters else words[: characters - 1] + "…"


def _notes(step: Step) -> list[tuple[str, str, str]]:
    """(number, words, colour) of the lines beside a stage."""
    shown, rest = step.losses[:_MAX_REASONS], step.losses[_MAX_REASONS:]
    lines = [(f"{loss.images:,}", loss.reason, _WORD_COLOURS[loss.verdict]) for loss in shown]
    if rest:
        lines.append((f"{sum(loss.images for loss in rest):,}", f"for {len(rest)} other reasons", _QUIET))
    return lines or [("0", "held back", _QUIET)]


def _foot(axes: Axes, counts: Mapping[str, Any], y: float) -> None:
    kept, seen = counts["kept"], counts["seen"]
    rejected, quarantined = (sum(counts[verdict].values()) for verdict in _COLOURS)
    axes.text(_NAME_IN, y + 0.32, f"{kept:,} kept", size=13, weight="bold", color=KEPT, va="center")
    total = f"{seen:,} = {kept:,} kept + {rejected:,} rejected + {quarantined:,} quarantined"
    axes.text(_NAME_IN, y + 0.62, total, size=9, color=_QUIET, va="center")
