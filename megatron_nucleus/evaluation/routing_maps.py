"""Routing maps of one drawing: two figures, a page to move through layers and steps, and all figures as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from megatron_nucleus.core.moe.stats import LayerReport, RoutingReport
from megatron_nucleus.evaluation.allocation import Drawing
from megatron_nucleus.evaluation.report_figures import allocation_figure, blues, evenly, experts_figure
from megatron_nucleus.evaluation.routing_page import TEMPLATE
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.staging import check_writable, explain_writing

FILES = ("allocation.png", "experts.png", "routing.html", "routing.json")
# Own choices: what a person takes in at one glance, and a page that a mail program accepts.
MAX_COLUMNS, MAX_ROWS, EXPERT_STEPS = 7, 8, 3
PAGE_BYTES = 5_000_000
_PALETTE_TAKEN = (21, 74, 140)
_LOSSLESS_PX = 128  # pictures up to this side are PNG, larger ones JPEG


def check_folder(folder: str | Path, overwrite: bool) -> None:
    """ConfigError where maps of an earlier drawing lie in ``folder`` and may not go, or nothing can be written."""
    folder = Path(folder)
    check_writable(folder)
    earlier = [name for name in FILES if (folder / name).exists()]
    if earlier and not overwrite:
        raise ConfigError(
            f"--output {folder}: holds {len(earlier)} files of an earlier job ({earlier[0]}, ...); choose another "
            "folder, or --overwrite to replace them"
        )


def check_layers(wanted: Sequence[int], layers: Sequence[int]) -> list[int]:
    """Positions of the ``wanted`` block numbers among the MoE ``layers``; ConfigError for one that does not route."""
    for number in wanted:
        if number not in layers:
            raise ConfigError(
                f"--layers {number}: the MoE layers of this model are {', '.join(map(str, layers))}"
            )
    return [layers.index(number) for number in wanted]


def write_routing_maps(
    drawing: Drawing,
    folder: str | Path,
    *,
    layers: Sequence[int] = (),
    checkpoint: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `FILES` into ``folder``.

    Args:
        layers: block numbers shown in experts.png; empty = first, middle and last MoE layer.
        checkpoint: what to call the model in the page and in routing.json.

    Returns:
        {"output", one key per file (its path), "page_steps", "page_expert_steps"}: how many steps the page holds, and
        how many of them with the choice of every single expert.

    Raises:
        ConfigError: files of an earlier drawing without ``overwrite``, a layer that does not route, or a folder that
            cannot be written.
        DataError: the disk is full.
    """
    folder, allocation = Path(folder), drawing.allocation
    check_folder(folder, overwrite)
    positions = check_layers(layers, allocation.layers) or evenly(len(allocation.layers), 3)
    page, page_steps, expert_steps = routing_page(drawing, checkpoint)
    with explain_writing(folder, "what was written so far stays there"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "allocation.png", _allocation_png(drawing))
        write_atomic(folder / "experts.png", _experts_png(drawing, positions))
        write_atomic(folder / "routing.html", page)
        write_json_atomic(folder / "routing.json", _document(drawing, checkpoint))
    paths = {Path(name).stem if name != "routing.html" else "page": str(folder / name) for name in FILES}
    return {"output": str(folder), **paths, "page_steps": page_steps, "page_expert_steps": expert_steps}


def _titles(drawing: Drawing, columns: Sequence[int]) -> list[str]:
    sigmas = drawing.allocation.sigmas
    return [f"step {i + 1}, noise {sigmas[i]:.2f}" for i in columns]


def _allocation_png(drawing: Drawing) -> bytes:
    columns = evenly(len(drawing.estimates), MAX_COLUMNS)
    shown = [drawing.estimates[i] for i in columns]
    return allocation_figure(
        drawing.allocation, drawing.picture, shown, _titles(drawing, columns), columns, MAX_ROWS
    )


def _experts_png(drawing: Drawing, layers: Sequence[int]) -> bytes:
    columns = evenly(len(drawing.estimates), EXPERT_STEPS)
    shown = [drawing.estimates[i] for i in columns]
    return experts_figure(drawing.allocation, shown, _titles(drawing, columns), columns, layers)


def _document(drawing: Drawing, checkpoint: str) -> dict[str, Any]:
    """routing.json."""
    allocation = drawing.allocation
    return {
        "checkpoint": checkpoint,
        "prompt": drawing.prompt,
        "seed": drawing.seed,
        "sampling": dataclasses.asdict(drawing.config),
        "grid": list(allocation.taken.shape[3:]),
        "experts": allocation.taken.shape[2],
        "layers": list(allocation.layers),
        **drawing.routing.document(),
        "kept_in_next_step": dict(zip(map(str, allocation.layers), drawing.kept.tolist(), strict=True)),
        "kept_by_chance": dict(zip(map(str, allocation.layers), drawing.chance, strict=True)),
    }


def routing_page(drawing: Drawing, checkpoint: str) -> tuple[str, int, int]:
    """The page, below `PAGE_BYTES`, how many steps it holds, and how many of them with every expert's choice.

    Pictures, counts and figures come first, the experts' own choices as far as there is room. Where a drawing is too
    large, steps are left out evenly and the page says so.

    Raises:
        ConfigError: not even one step fits, or more than 255 experts took one token (counts are bytes).
    """
    allocation = drawing.allocation
    reports, whole = drawing.routing.reports()
    counts = allocation.counts()
    if counts.max() > 255:
        raise ConfigError(f"{int(counts.max())} experts took one token; the page stores at most 255")
    pictures = [_uri(picture) for picture in drawing.estimates]
    packed = [_pack(counts[:, i].numpy().astype(np.uint8)) for i in range(len(pictures))]
    figures = _figures(drawing, reports)
    head = _head(drawing, whole, int(counts.max()))
    fixed = len(_render(drawing, head, checkpoint).encode()) + 1000  # and the words on what was left out
    sizes = [len(a) + len(b) + len(_json([row[i] for row in figures])) + 100
             for i, (a, b) in enumerate(zip(pictures, packed, strict=True))]  # fmt: skip
    held = _fitting(sizes, PAGE_BYTES - fixed)
    if not held:
        raise ConfigError(
            f"one step of this drawing needs {fixed + max(sizes)} bytes, a page may have {PAGE_BYTES}"
        )
    experts = {i: _pack(np.packbits(allocation.taken[:, i].numpy())) for i in held}
    room = PAGE_BYTES - fixed - sum(sizes[i] for i in held)
    detailed = {held[i] for i in _fitting([len(experts[i]) for i in held], room)}
    head["figures"] = [[row[i] for i in held] for row in figures]
    head["steps"] = [
        {"number": i + 1, "sigma": round(allocation.sigmas[i], 4), "picture": pictures[i], "counts": packed[i],
         "experts": experts[i] if i in detailed else None}
        for i in held
    ]  # fmt: skip
    return _render(drawing, head, checkpoint), len(held), len(detailed)


def _fitting(sizes: Sequence[int], room: int) -> list[int]:
    """The most positions, evenly spread, whose sizes sum to at most ``room``."""
    for count in range(len(sizes), 1, -1):
        chosen = evenly(len(sizes), count)
        if sum(sizes[i] for i in chosen) <= room:
            return chosen
    return [0] if sizes and sizes[0] <= room else []


def _head(drawing: Drawing, whole: RoutingReport, most: int) -> dict[str, Any]:
    """The page's data that is not there once per step."""
    allocation = drawing.allocation
    palette = [(255, 255, 255), *(tuple(round(255 * c) for c in colour) for colour in blues(most))]
    return {
        "grid": list(allocation.taken.shape[3:]),
        "experts": allocation.taken.shape[2],
        "layers": list(allocation.layers),
        "total_steps": len(drawing.estimates),
        "chance": [round(c, 4) for c in drawing.chance],
        "palette": palette,
        "taken": _PALETTE_TAKEN,
        "smooth": max(drawing.estimates[0].size) > _LOSSLESS_PX,
        "whole": [
            {"time": _short(r.time_entropy), "explained": _short(r.sigma_explained), "ratio": _short(r.spread_ratio),
             "dead": len(r.dead_experts)}
            for r in whole.layers
        ],
        "figures": [],
        "steps": [],
    }  # fmt: skip


def _figures(drawing: Drawing, reports: list[RoutingReport]) -> list[list[dict]]:
    """[layers][steps] of what the page shows beside the map."""
    kept = drawing.kept.tolist()
    return [
        [
            _row(
                report.layers[layer], kept[layer][i - 1] if i else None, drawing.routing.meter.space_cells**2
            )
            for i, report in enumerate(reports)
        ]
        for layer in range(len(drawing.allocation.layers))
    ]


def _row(report: LayerReport, kept: float | None, regions: int) -> dict:
    most = min(
        1.0, math.log(report.tokens_per_expert_max) / math.log(regions)
    )  # each token in another region
    return {
        "none": _short(report.taken_by_none),
        "one": _short(report.taken_by_one),
        "mean": _short(report.experts_per_token),
        "rows": _short(report.tokens_per_expert_max),
        "kept": _short(kept),
        "space": _short(report.space_entropy),
        "most": _short(most),
        "least": _short(report.least_mass),
        "spread": _short(report.spread),
    }


def _render(drawing: Drawing, data: dict, checkpoint: str) -> str:
    config, (h, w) = drawing.config, data["grid"]
    facts = [f"{config.width} x {config.height} px", f"seed {drawing.seed}", f"guidance {config.guidance:g}",
             f"shift {config.shift:g}", checkpoint]  # fmt: skip
    held, detailed = len(data["steps"]), sum(step["experts"] is not None for step in data["steps"])
    if held < data["total_steps"]:
        facts.append(f"this page holds {held} of {data['total_steps']} steps")
    if detailed < held:
        facts.append(f"the choices of single experts are stored for {detailed} of {held} steps")
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    return page.render(
        title=drawing.prompt or "(no prompt)",
        prompt=drawing.prompt or "(no prompt)",
        tokens=f"{h * w:,}",
        rows=h,
        columns=w,
        layer_count=len(data["layers"]),
        experts=data["experts"],
        steps=data["total_steps"],
        settings=", ".join(filter(None, facts)) + ".",
        data=markupsafe.Markup(_json(data).replace("<", "\\u003c")),
    )


def _pack(array: np.ndarray) -> str:
    """zlib and base64. Choices without a pattern take least room, and time, where no repetition is looked for."""
    raw = array.tobytes()
    plain = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    packed = min(plain.compress(raw) + plain.flush(), zlib.compress(raw), key=len)
    return base64.b64encode(packed).decode()


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(picture.size) <= _LOSSLESS_PX:
        picture.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
