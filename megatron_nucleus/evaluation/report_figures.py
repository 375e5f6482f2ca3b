"""Figures of the run report, each as PNG bytes; drawn without a display and without global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from megatron_nucleus.evaluation.allocation import Allocation

DPI = 130
SERIES = ("#2563a8", "#e08a2e", "#9aa4b0", "#3f9a6b", "#8a63b8", "#b84a5a")
_RAW, _MEAN, _INK, _GRID = "#bccbdc", "#2563a8", "#333b47", "#e6e9ee"
MAX_LAYERS, MAX_EXPERTS = 6, 16
_LABEL_CELLS = 12  # grids up to so many rows and columns show their numbers


def loss_figure(rows: Sequence[Mapping], window_steps: int) -> bytes:
    """Loss over training: every logged step, and the mean of each ``window_steps`` steps."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, loss = column(rows, "step"), column(rows, "loss")
    axes.plot(steps, loss, color=_RAW, linewidth=0.9, label="each logged step")
    centres, means = binned(steps, loss, window_steps)
    axes.plot(
        centres,
        means,
        color=_MEAN,
        linewidth=2,
        marker="o",
        markersize=3,
        label=f"mean of {window_steps} steps",
    )
    finite = loss[np.isfinite(loss)]
    if len(finite) > 20:  # the first steps would flatten the rest of the curve
        low, high = finite.min(), np.quantile(finite, 0.98)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    samples = column(rows, "samples_seen")
    per_step = samples[-1] / steps[-1] if steps[-1] else 0.0
    if per_step > 0:
        top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        top.set_xlabel("images seen", color=_INK)
        top.tick_params(colors=_INK)
        top.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(axes, "optimizer step", "training loss")
    axes.legend(frameon=False)
    return png(figure)


def health_figure(rows: Sequence[Mapping]) -> bytes:
    """Gradient norm, learning rate and speed over training, side by side."""
    figure = Figure(figsize=(8.6, 2.3), layout="constrained")
    panels = (("grad_norm", "gradient norm"), ("lr", "learning rate"), ("samples_per_s", "images per second"))
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(column(rows, "step"), column(rows, key), color=_MEAN, linewidth=1.1)
        _dress(axes, "optimizer step", "")
        axes.set_title(label, fontsize=9, color=_INK)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    return png(figure)


def scores_figure(scores: Mapping[str, Mapping], skills: Mapping[str, str]) -> bytes:
    """Grouped bars: one group per skill, one colour per source of pictures. Skills without pictures have no bar.

    Args:
        scores: source -> {skill: accuracy in [0, 1] or None, "standard_error": {skill: error}}.
        skills: key -> label, in order.
    """
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.82 / len(scores)
    for i, values in enumerate(scores.values()):
        for j, key in enumerate(skills):
            value = values.get(key)
            if value is None:
                continue
            error = (values.get("standard_error") or {}).get(key)
            x = j + (i - (len(scores) - 1) / 2) * width
            bars = {"elinewidth": 0.8, "ecolor": _INK}
            axes.bar(x, value, width * 0.92, color=SERIES[i % len(SERIES)], yerr=error, error_kw=bars)
            axes.text(
                x,
                value + (error or 0) + 0.012,
                f"{value:.2f}",
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=_INK,
            )
    _dress(axes, "", "share of correct pictures")
    axes.set_xticks(range(len(skills)), skills.values())
    axes.set_xlim(-0.6, len(skills) - 0.4)
    axes.set_ylim(0, 1.12)
    axes.grid(axis="x", visible=False)
    names = [Patch(color=SERIES[i % len(SERIES)], label=name) for i, name in enumerate(scores)]
    figure.legend(handles=names, frameon=False, ncols=len(scores), loc="outside upper center", fontsize=9)
    return png(figure)


def allocation_figure(
    allocation: Allocation,
    picture: Image.Image,
    shown: Sequence[Image.Image],
    titles: Sequence[str],
    columns: Sequence[int] | None = None,
    most_layers: int = MAX_LAYERS,
) -> bytes:
    """How many experts took each token: rows are MoE layers (evenly chosen where there are many), columns noise levels.

    Args:
        picture: the finished one. shown, titles: what stands over each column.
        columns: which noise levels of the allocation; None = all.
    """
    columns = range(len(allocation.sigmas)) if columns is None else columns
    layers = evenly(len(allocation.layers), most_layers)
    counts = allocation.taken[layers][:, list(columns)].sum(2).numpy()
    size = (1.5 * len(shown) + 1.9, 1.42 * (len(layers) + 1) * _aspect(picture) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(layers) + 1, len(shown) + 1, squeeze=False)
    for axes in grid.flat:
        _bare(axes)
    for axes, image, title in zip(grid[0], (picture, *shown), ("finished picture", *titles), strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, color=_INK)
    most = max(1, int(counts.max()))
    norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
    mesh = None
    for i, layer in enumerate(layers):
        grid[i + 1, 0].axis("off")
        grid[i + 1, 0].text(
            0.95, 0.5, f"layer {allocation.layers[layer]}", ha="right", va="center", fontsize=9, color=_INK
        )
        for j in range(len(shown)):
            mesh = _heat(grid[i + 1, j + 1], counts[i, j], most, norm)
    bar = figure.colorbar(mesh, ax=grid[1:, :], location="right", shrink=0.8, aspect=28, ticks=_few(most))
    bar.set_label("experts that took the token", fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=8, colors=_INK)
    return png(figure)


def experts_figure(
    allocation: Allocation,
    shown: Sequence[Image.Image],
    titles: Sequence[str],
    columns: Sequence[int],
    layers: Sequence[int] | None = None,
) -> bytes:
    """Which tokens each of the first 16 experts took: what it did not take is darkened. One row per layer and column.

    Args:
        shown, titles: picture under each of ``columns``, and what to call it in the name of a row.
        columns: which noise levels of the allocation.
        layers: positions in ``allocation.layers``; None = evenly chosen.
    """
    layers = evenly(len(allocation.layers), MAX_LAYERS) if layers is None else layers
    experts = range(min(allocation.taken.shape[2], MAX_EXPERTS))
    rows = [(layer, j) for layer in layers for j in range(len(columns))]
    cell = 8.4 / max(8, len(experts))
    size = (cell * len(experts) + 1.4, 0.98 * cell * len(rows) * _aspect(shown[0]) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(experts), squeeze=False)
    for i, (layer, j) in enumerate(rows):
        pixels = np.asarray(shown[j], np.float32) / 255
        for expert in experts:
            axes = grid[i, expert]
            _bare(axes)
            axes.imshow(_spotlight(pixels, allocation.taken[layer, columns[j], expert].numpy()))
            if i == 0:
                title = f"expert {expert}" if len(experts) <= 8 or expert == 0 else str(expert)
                axes.set_title(title, fontsize=8, color=_INK)
        name = "\n".join(filter(None, (f"layer {allocation.layers[layer]}", titles[j])))
        grid[i, 0].set_ylabel(name, fontsize=8, color=_INK, rotation=0, ha="right", va="center")
    return png(figure)


def column(rows: Sequence[Mapping], key: str) -> np.ndarray:
    """Values of one key as fp64; missing and null become NaN, which is not drawn."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def binned(steps: np.ndarray, values: np.ndarray, window_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the finite values of each window of steps, at the mean step of its rows; empty windows are left out.

    Window k holds steps k*window + 1 to (k + 1)*window.
    """
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    index = ((steps - 1) // window_steps).astype(int)
    used = np.unique(index)
    return (
        np.array([steps[index == k].mean() for k in used]),
        np.array([values[index == k].mean() for k in used]),
    )


def evenly(count: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers 0 .. count-1, first and last included, evenly spread."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _heat(axes, counts: np.ndarray, most: int, norm: BoundaryNorm):
    """One map of counts; white is no expert, darker is more."""
    shades = ListedColormap([(1, 1, 1), *blues(most)])
    mesh = axes.imshow(counts, cmap=shades, norm=norm)
    rows, columns = counts.shape
    if max(rows, columns) <= _LABEL_CELLS:
        for y in range(rows):
            for x in range(columns):
                ink = "white" if counts[y, x] > 0.55 * most else _INK
                axes.text(x, y, str(counts[y, x]), ha="center", va="center", fontsize=7, color=ink)
    return mesh


def blues(count: int) -> list[tuple[float, ...]]:
    """RGB in [0, 1] of the counts 1 to ``count``; 0 is white."""
    light, dark = np.array([0.85, 0.91, 0.97]), np.array([0.06, 0.20, 0.42])
    return [tuple(light + (dark - light) * i / max(1, count - 1)) for i in range(count)]


def _spotlight(pixels_HWC: np.ndarray, taken_hw: np.ndarray) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]
    rows, columns = taken_hw.shape
    mask = taken_hw.repeat(height // rows, 0).repeat(width // columns, 1)[..., None]
    return np.where(mask, pixels_HWC, 0.12 + 0.16 * pixels_HWC)


def _aspect(picture: Image.Image) -> float:
    return min(2.0, max(0.5, picture.height / picture.width))


def _few(most: int) -> list[int]:
    return list(range(0, most + 1, -(-(most + 1) // 10)))


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c9ced6")


def _dress(axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aab2bd")


def mean_taken(allocation: Allocation) -> tuple[float, float]:
    """(experts per token, share of tokens that no expert took), over all layers and noise levels."""
    counts = allocation.counts().float()
    return float(counts.mean()), float((counts == 0).float().mean())
