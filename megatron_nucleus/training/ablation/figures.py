"""Figures of the bench, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_nucleus.evaluation.report_figures import png
from megatron_nucleus.training.ablation.rows import SKILLS
from megatron_nucleus.training.ablation.statistics import spread
from megatron_nucleus.training.ablation.suites import Suite

# Ten colours that stay apart for most forms of colour blindness, and line styles for more than ten arms.
COLORS = (
    "#2563a8",
    "#e08a2e",
    "#3f9a6b",
    "#b84a5a",
    "#8a63b8",
    "#7a5c3a",
    "#d46ca8",
    "#6b7480",
    "#a8a82e",
    "#2ea8b8",
)
STYLES = ("-", "--", ":")
INK, GRID = "#333b47", "#e6e9ee"

# Mean over the MoE layers on held-out images (core/moe/stats.py, core/moe/agreement.py): key -> words.
ROUTING = {
    "mean/sigma_explained": "logit variance\nbetween noise levels",
    "mean/spread_low": "logit spread, sigma < 0.3",
    "mean/spread_high": "logit spread, sigma > 0.7",
    "mean/spread_ratio": "spread, low / high noise",
    "mean/agreement_neighbours": "same tokens at\nthe next noise level",
    "mean/agreement_ends": "same tokens\nat both ends",
}

AGREEMENT = "mean/agreement/"  # + LOW-HIGH, two neighbouring noise levels

ByArm = Mapping[str, Mapping[int, dict]]


def draw(suite: Suite, by_arm: ByArm) -> dict[str, bytes]:
    """File name -> PNG of every figure that the finished rows allow."""
    trained = {n: rows for n, rows in by_arm.items() if rows and not suite.arms[n].source}
    finished = {n: rows for n, rows in by_arm.items() if rows}
    out = {f"{suite.name}_scores.png": scores_figure(finished)}
    if any(len(row["valid_curve"]) > 1 for rows in trained.values() for row in rows.values()):
        out[f"{suite.name}_validation_loss.png"] = loss_figure(trained)
    routed = {n: rows for n, rows in finished.items() if all(r["valid_routing"] for r in rows.values())}
    if routed:
        out[f"{suite.name}_routing.png"] = routing_figure(routed)
    by_noise = {n: rows for n, rows in routed.items() if all(agreement_steps(r) for r in rows.values())}
    if by_noise:
        out[f"{suite.name}_routing_by_noise.png"] = agreement_figure(by_noise)
    return out


def loss_figure(by_arm: ByArm) -> bytes:
    """Validation loss over images and over training FLOPs: mean over seeds, band of one standard deviation."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (name, rows) in enumerate(by_arm.items()):
        x, mean, std = loss_band([row["valid_curve"] for row in rows.values()])
        for panel, column in zip(axes, (0, 1), strict=True):
            style = {
                "color": COLORS[number % len(COLORS)],
                "linestyle": STYLES[number // len(COLORS) % len(STYLES)],
            }
            panel.plot(x[:, column], mean, label=name, linewidth=1.6, **style)
            panel.fill_between(
                x[:, column], mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0
            )
    for panel, label in zip(axes, ("images seen", "training FLOPs"), strict=True):
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:.3g}")
        _dress(panel, label, "validation loss")
    axes[0].legend(frameon=False, fontsize=8)
    return png(figure)


def loss_band(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([points, 2] images and FLOPs, mean, sample standard deviation) where all seeds validated at the same images.

    The standard deviation of a single seed is drawn as 0.
    """
    common = set.intersection(*({point[0] for point in curve} for curve in curves))
    points = np.array([[p for p in curve if p[0] in common] for curve in curves])
    std = points[:, :, 2].std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(points.shape[1])
    return points[0, :, :2], points[:, :, 2].mean(axis=0), std


def scores_figure(by_arm: ByArm) -> bytes:
    """Mean score and each skill as dots with bars of one standard deviation over seeds, an arm a row."""
    names = ("mean", *SKILLS)
    figure = Figure(figsize=(12, 1.2 + 0.32 * len(by_arm)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for panel, skill in zip(panels, names, strict=True):
        for number, rows in enumerate(by_arm.values()):
            values = [r["scores"][skill] for r in rows.values() if r["scores"][skill] is not None]
            if not values:
                continue
            found = spread(values)
            color = COLORS[0] if number == 0 else INK
            panel.errorbar(found.mean, number, xerr=found.std, fmt="o", color=color, markersize=4, capsize=2)
        _dress(panel, skill.replace("_", " "), "")
    panels[0].set_yticks(range(len(by_arm)), list(by_arm))
    panels[0].invert_yaxis()
    return png(figure)


def routing_figure(by_arm: ByArm) -> bytes:
    """How steady the routers are when the noise changes: figures of the held-out images, mean over MoE layers."""
    figure = Figure(figsize=(13, 1.2 + 0.32 * len(by_arm)), layout="constrained")
    for panel, (key, label) in zip(
        figure.subplots(1, len(ROUTING), sharey=True), ROUTING.items(), strict=True
    ):
        for number, rows in enumerate(by_arm.values()):
            found = spread(routing_values(rows, key))
            if found is not None:
                color = COLORS[0] if number == 0 else INK
                panel.errorbar(
                    found.mean, number, xerr=found.std, fmt="o", color=color, markersize=4, capsize=2
                )
        _dress(panel, label, "")
        panel.set_yticks(range(len(by_arm)), list(by_arm))
    figure.axes[0].invert_yaxis()
    return png(figure)


def agreement_figure(by_arm: ByArm) -> bytes:
    """Share of each expert's tokens that it keeps from one noise level to the next, over the noise levels."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(by_arm.items()):
        steps = [agreement_steps(row) for row in rows.values()]
        found = [spread([step[sigma] for step in steps]) for sigma in steps[0]]
        style = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": STYLES[number // len(COLORS) % len(STYLES)],
        }
        errors = [value.std or 0.0 for value in found]
        axes.errorbar(list(steps[0]), [v.mean for v in found], errors, label=name, capsize=2, **style)
    _dress(axes, "noise level, between the two", "same tokens at the next level")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def agreement_steps(row: dict) -> dict[float, float]:
    """Noise level half-way between two neighbours -> agreement of the choices there."""
    entries = (row["valid_routing"] or {}).items()
    found = [
        (key.removeprefix(AGREEMENT).split("-"), value) for key, value in entries if key.startswith(AGREEMENT)
    ]
    return {(float(low) + float(high)) / 2: value for (low, high), value in found}


def routing_values(rows: Mapping[int, dict], key: str) -> list[float]:
    """A routing figure of every seed that has it."""
    values = [(row["valid_routing"] or {}).get(key) for row in rows.values()]
    return [value for value in values if value is not None]


def _dress(axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
