"""``report.html`` of a training run: pictures, scores, loss, expert allocation, time and settings in one file.

For a person who never saw the code: every figure comes with a sentence that says what it shows.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image, UnidentifiedImageError

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.evaluation import report_figures as figures
from megatron_nucleus.evaluation.allocation import allocation_example, expert_allocation, moe_layers
from megatron_nucleus.evaluation.error_bars import shown
from megatron_nucleus.evaluation.report_page import TEMPLATE
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.export.load import read_description
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_atomic

__all__ = ["build_report", "expert_allocation"]

SKILLS = {
    "single_object": "single object", "two_objects": "two objects", "counting": "counting", "colors": "colours",
    "position": "position", "color_attribution": "attribution", "mean": "mean",
}  # fmt: skip
MAX_PICTURES, MAX_PREVIEWS = 48, 6
THUMBNAIL_PX, PREVIEW_PX = 296, 1040  # twice the size on the page, for sharp screens
WINDOW_STEPS = 100  # the loss curve's thick line
_BAR_PX = 320
_STEP = re.compile(r"step_(\d+)\.png")


def build_report(
    output: str | Path,
    *,
    title: str,
    summary: str = "",
    run_dir: str | Path | None = None,
    samples_dir: str | Path | None = None,
    checkpoint: str | Path | None = None,
    allocation_prompt: str | None = None,
    scores: Mapping[str, Mapping] | None = None,
    scores_note: str = "",
    timings: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    device: str = "auto",
) -> Path:
    """Write the report; a section whose input is not given is left out.

    Args:
        output: the HTML file.
        title, summary: heading, and a paragraph under it.
        run_dir: a run folder: loss from metrics.jsonl, settings from config.yaml, previews from samples/.
        samples_dir: a folder of tools/sample.py: its first 48 pictures with their prompts.
        checkpoint: any checkpoint: architecture, and the expert-allocation map of one picture drawn with it.
        allocation_prompt: prompt of that picture; None = the first of ``samples_dir``, else the empty prompt.
        scores: source of pictures -> object that ``tools/evaluate.py scenes --json`` prints; in this order.
        scores_note: sentence about where the scored prompts come from.
        timings: stage -> seconds, in order.
        facts: more rows of the table of settings.
        commands: commands that make the results again.
        device: where the picture of the map is drawn.

    Returns:
        the path of the file.

    Raises:
        ConfigError: a folder that is not there.
        DataError: a damaged file, naming it.
    """
    run = Path(run_dir) if run_dir is not None else None
    if run is not None and not run.is_dir():
        raise ConfigError(f"run folder {run}: no such folder")
    _check_scores(scores or {})
    rows = _metrics(run / "metrics.jsonl") if run is not None else []
    listed = _listed(Path(samples_dir)) if samples_dir is not None else []
    prompt = allocation_prompt
    if prompt is None:
        prompt = listed[0]["prompt"] if listed else ""
    shape = read_description(checkpoint).shape if checkpoint is not None else None
    document = _document(run / "config.yaml") if run is not None else {}
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    html = page.render(
        title=title,
        summary=summary,
        tiles=_tiles(rows, _earlier_images(document), scores, timings, shape),
        pictures=_pictures(listed, Path(samples_dir)) if listed else None,
        pictures_note=f" (the first {MAX_PICTURES} of {len(listed)})" if len(listed) > MAX_PICTURES else "",
        scores=_scores(scores) if scores else None,
        scores_note=_scores_note(scores_note, scores or {}),
        previews=_previews(run / "samples", rows) if run is not None else None,
        loss=_loss(rows) if rows else None,
        allocation=_allocation(checkpoint, prompt, device, shape) if shape is not None else None,
        timings=_timings(timings) if timings else None,
        facts=_facts(shape, rows, document, facts),
        config=yaml.safe_dump(document["config"], sort_keys=False) if document.get("config") else None,
        commands=commands,
    )
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, html)
    except OSError as error:
        raise ConfigError(f"report {output}: cannot be written ({error.strerror})") from error
    return output


def _metrics(path: Path) -> list[dict]:
    """Rows of metrics.jsonl, last one of each step; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows: dict[int, dict] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never finished
        try:
            row = json.loads(line)
            rows[row["step"]] = {"samples_seen": row["samples_seen"], "loss": row["loss"], **row}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no row of metrics ({error}); remove the line") from error
    return [rows[step] for step in sorted(rows)]


def _document(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())}); restore it") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: damaged, expected a mapping; restore it")
    return document


def _listed(folder: Path) -> list[dict]:
    """Rows of samples.jsonl."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"samples folder {folder}: holds no samples.jsonl; name a folder of tools/sample.py"
        )
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            out.append({"file": str(row["file"]), "prompt": str(row["prompt"]), "seed": row["seed"]})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no row of a picture ({error}); sample again") from error
    return out


def _earlier_images(document: dict) -> int:
    """Images seen by the runs that this one started from (config.yaml)."""
    return (document.get("started_from") or {}).get("samples_seen_in_all", 0)


def _tiles(
    rows: list[dict],
    earlier_images: int,
    scores: Mapping | None,
    timings: Mapping | None,
    shape: ModelShape | None,
) -> list[tuple[str, str]]:
    """The figures at a glance: label and value."""
    tiles = []
    if scores:
        name, result = next(iter(scores.items()))
        if result.get("mean") is not None:
            error = (result.get("standard_error") or {}).get("mean")
            bar = f" ± {error:.2f}" if error is not None else ""
            tiles.append((f"mean score, {name}", f"{result['mean']:.2f}{bar}"))
    if rows:
        where = "all stages" if earlier_images else "training"
        tiles.append((f"images seen in {where}", f"{earlier_images + rows[-1]['samples_seen']:,}"))
    if shape is not None:
        tiles.append(("parameters", _millions(count_parameters(shape))))
    if timings:
        tiles.append(("in all", f"{sum(timings.values()) / 60:.1f} min"))
    return tiles


def _pictures(listed: list[dict], folder: Path) -> list[dict]:
    out = []
    for row in listed[:MAX_PICTURES]:
        picture = _open(folder / Path(row["file"]).name)
        small = max(picture.size) < THUMBNAIL_PX
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        out.append(
            {"uri": _uri(_encode(picture)), "small": small, "prompt": row["prompt"], "seed": row["seed"]}
        )
    return out


def _previews(folder: Path, rows: list[dict]) -> list[dict]:
    """Contact sheets of up to six steps, first and last included."""
    steps = {int(m[1]): p for p in folder.glob("step_*.png") if (m := _STEP.fullmatch(p.name))}
    order = sorted(steps)
    seen = {row["step"]: row["samples_seen"] for row in rows}
    out = []
    for i in figures.evenly(len(order), MAX_PREVIEWS):
        sheet = _open(steps[order[i]])
        sheet.thumbnail((PREVIEW_PX, 4 * PREVIEW_PX), Image.Resampling.LANCZOS)
        samples = f"{seen[order[i]]:,}" if order[i] in seen else None
        out.append({"uri": _uri(_encode(sheet)), "step": f"{order[i]:,}", "samples": samples})
    return out


def _check_scores(scores: Mapping[str, Mapping]) -> None:
    for name, result in scores.items():
        for key in SKILLS:
            value, error = result.get(key), (result.get("standard_error") or {}).get(key)
            if not (value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)):
                raise DataError(
                    f"scores of '{name}': {key} is {value!r}, expected a number from 0 to 1; score again"
                )
            if not (error is None or (isinstance(error, (int, float)) and 0 <= error < math.inf)):
                raise DataError(
                    f"scores of '{name}': the standard error of {key} is {error!r}, expected a number of at least 0; "
                    "score again"
                )


def _scores(scores: Mapping[str, Mapping]) -> dict:
    rows = [
        {"label": label, "mean": key == "mean", "cells": [_score(r, key) for r in scores.values()]}
        for key, label in SKILLS.items()
    ]
    held_out = [result.get("held_out_pairs") or {} for result in scores.values()]
    for key, label in SKILLS.items():
        if any(key in split for split in held_out):
            cells = [_score(split, key) for split in held_out]
            rows.append({"label": f"{label}, pairs never shown in training", "mean": False, "cells": cells})
    return {
        "names": list(scores),
        "rows": [
            *rows,
            {"label": "pictures", "mean": False, "cells": [r.get("samples", "–") for r in scores.values()]},
        ],
        "figure": _uri(figures.scores_figure(scores, SKILLS)),
    }


def _score(result: Mapping, key: str) -> str:
    return shown(result.get(key), (result.get("standard_error") or {}).get(key))


def _scores_note(note: str, scores: Mapping[str, Mapping]) -> str:
    """The caller's sentence, and what ± means where it is shown."""
    if not any(result.get("standard_error") for result in scores.values()):
        return note
    return f"{note} ± is one standard error, from the number of pictures; another training run may differ by more."


def _loss(rows: list[dict]) -> dict:
    steps, loss = figures.column(rows, "step"), figures.column(rows, "loss")
    window = min(WINDOW_STEPS, max(1, int(steps[-1]) // 4))  # a short run still gets a line
    means = figures.binned(steps, loss, window)[1]
    return {
        "figure": _uri(figures.loss_figure(rows, window)),
        "health": _uri(figures.health_figure(rows)),
        "window": window,
        "first": f"{means[0]:.3f}" if len(means) else "–",
        "last": f"{means[-1]:.3f}" if len(means) else "–",
        "skipped": rows[-1].get("skipped"),
    }


def _allocation(checkpoint: str | Path, prompt: str, device: str, shape: ModelShape) -> dict | None:
    """The map of one picture; None for a model without experts."""
    if not moe_layers(shape):
        return None
    example = allocation_example(load_pipeline(checkpoint, device=device), prompt)
    mean, untaken = figures.mean_taken(example.allocation)
    sigmas = example.allocation.sigmas
    middle = len(sigmas) // 2
    hidden = shape.num_experts - figures.MAX_EXPERTS
    return {
        "figure": _uri(figures.allocation_figure(*example.figure())),
        "which": _uri(figures.experts_figure(example.allocation, [example.picture], [""], [middle])),
        "prompt": prompt or "(no prompt)",
        "experts": shape.num_experts,
        "mean": f"{mean:.2f}",
        "untaken": f"{untaken:.1%}",
        "sigma": f"{sigmas[middle]:g}",
        "note": f" Only the first {figures.MAX_EXPERTS} experts are shown." if hidden > 0 else "",
    }


def _timings(timings: Mapping[str, float]) -> list[dict]:
    total = sum(timings.values())
    rows = [
        {"name": name, "seconds": f"{s:,.1f}", "share": f"{s / max(total, 1e-9):.0%}",
         "width": round(_BAR_PX * s / max(total, 1e-9)), "total": False}
        for name, s in timings.items()
    ]  # fmt: skip
    return [*rows, {"name": "in all", "seconds": f"{total:,.1f}", "share": "", "width": 0, "total": True}]


def _facts(
    shape: ModelShape | None, rows: list[dict], document: dict, more: Mapping | None
) -> list[tuple[str, str]]:
    """Rows of the table of settings."""
    facts: list[tuple[str, str]] = []
    if shape is not None:
        moe = sum(shape.is_moe(layer) for layer in range(shape.num_layers))
        facts += [
            ("parameters", f"{count_parameters(shape):,}"),
            ("transformer", f"{shape.num_layers} layers of width {shape.width}, {moe} of them with {shape.num_experts} "
             "experts and a shared one"),
        ]  # fmt: skip
    if rows:
        facts += [
            ("optimizer steps", f"{rows[-1]['step']:,}"),
            ("images seen", f"{rows[-1]['samples_seen']:,}"),
        ]
        if earlier := _earlier_images(document):
            facts.append(("images seen in the stages before", f"{earlier:,}"))
        if rows[-1].get("peak_memory_bytes"):
            facts.append(("peak memory of training", f"{rows[-1]['peak_memory_bytes'] / 1e9:.2f} GB"))
    config = document.get("config") or {}
    for section, key, label in (("training", "global_batch_size", "images per step"),
                                ("data", "resolution_px", "resolution, px"),
                                ("optimizer", "lr", "learning rate"), ("training", "seed", "seed")):  # fmt: skip
        value = (config.get(section) or {}).get(key)
        if value is not None:
            facts.append((label, str(value)))
    facts += [(f"version of {name}", str(v)) for name, v in (document.get("versions") or {}).items()]
    if document.get("git_commit"):
        facts.append(("source", str(document["git_commit"])))
    return facts + [(name, str(value)) for name, value in (more or {}).items()]


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(
            f"{path}: cannot be read as a picture ({type(error).__name__}); make it again"
        ) from error


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
