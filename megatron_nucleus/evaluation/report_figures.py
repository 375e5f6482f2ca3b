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

from megatron_nucleus.evaluation.allocation import Allocation, Example

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
        scores: source -> {skill: accuracy in [0, 1] or None}.
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
            x = j + (i - (len(scores) - 1) / 2) * width
            axes.bar(x, value, width * 0.92, color=SERIES[i % len(SERIES)])
            axes.text(x, value + 0.012, f"{value:.2f}", ha="center", va="bottom", fontsize=6.5, color=_INK)
    _dress(axes, "", "share of correct pictures")
    axes.set_xticks(range(len(skills)), skills.values())
    axes.set_xlim(-0.6, len(skills) - 0.4)
    axes.set_ylim(0, 1.12)
    axes.grid(axis="x", visible=False)
    names = [Patch(color=SERIES[i % len(SERIES)], label=name) for i, name in enumerate(scores)]
    figure.legend(handles=names, frameon=False, ncols=len(scores), loc="outside upper center", fontsize=9)
    return png(figure)


def allocation_figure(example: Example) -> bytes:
    """How many experts took each token: rows are MoE layers, columns noise levels, on top what the model was shown."""
    allocation = example.allocation
    counts = allocation.counts().numpy()
    shown = evenly(len(allocation.layers), MAX_LAYERS)
    columns = len(allocation.sigmas)
    size = (1.5 * columns + 1.9, 1.5 * (len(shown) + 1) * _aspect(example.picture) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown) + 1, columns + 1, squeeze=False)
    for axes in grid.flat:
        _bare(axes)
    grid[0, 0].imshow(example.picture)
    grid[0, 0].set_title("finished picture", fontsize=8, color=_INK)
    for j, (sigma, noisy) in enumerate(zip(allocation.sigmas, example.noisy, strict=True)):
        grid[0, j + 1].imshow(noisy)
        grid[0, j + 1].set_title(f"noise level {sigma:g}", fontsize=8, color=_INK)
    most = max(1, int(counts[shown].max()))
    norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
    mesh = None
    for i, layer in enumerate(shown):
        grid[i + 1, 0].axis("off")
        grid[i + 1, 0].text(
            0.95, 0.5, f"layer {allocation.layers[layer]}", ha="right", va="center", fontsize=9, color=_INK
        )
        for j in range(columns):
            mesh = _heat(grid[i + 1, j + 1], counts[layer, j], most, norm)
    bar = figure.colorbar(mesh, ax=grid[1:, :], location="right", shrink=0.8, ticks=_few(most))
    bar.set_label("experts that took the token", fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=8, colors=_INK)
    return png(figure)


def experts_figure(example: Example, sigma_index: int) -> bytes:
    """Which tokens each expert took at one noise level: what it did not take is darkened."""
    allocation = example.allocation
    taken = allocation.taken.numpy()[:, sigma_index]
    layers, experts = evenly(len(allocation.layers), MAX_LAYERS), range(min(taken.shape[1], MAX_EXPERTS))
    per_cell = 8.4 / max(8, len(experts))
    size = (per_cell * len(experts) + 0.6, per_cell * len(layers) * _aspect(example.picture) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(layers), len(experts), squeeze=False)
    pixels = np.asarray(example.picture, np.float32) / 255
    for i, layer in enumerate(layers):
        for expert in experts:
            axes = grid[i, expert]
            _bare(axes)
            axes.imshow(_spotlight(pixels, taken[layer, expert]))
            if i == 0:
                axes.set_title(f"expert {expert}", fontsize=8, color=_INK)
        grid[i, 0].set_ylabel(f"layer {allocation.layers[layer]}", fontsize=8, color=_INK)
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
    shades = ListedColormap([(1, 1, 1), *_blues(most)])
    mesh = axes.imshow(counts, cmap=shades, norm=norm)
    rows, columns = counts.shape
    if max(rows, columns) <= _LABEL_CELLS:
        for y in range(rows):
            for x in range(columns):
                ink = "white" if counts[y, x] > 0.55 * most else _INK
                axes.text(x, y, str(counts[y, x]), ha="center", va="center", fontsize=7, color=ink)
    return mesh


def _blues(count: int) -> list[tuple[float, ...]]:
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
    return evenly(most + 1, 9)


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
