"""Stages of your own: a function, what it reads, and why it may drop an image.

recipe:
  stages: [inspect, {examples/curation/my_stages.py:portraits: {max_height_over_width: 1.5}}, ...]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation.stage import Drop, Row, row_stage
from megatron_nucleus.utils.config import knob


@dataclasses.dataclass(frozen=True)
class Portraits:
    """Which portraits are kept."""

    max_height_over_width: float = knob(1.8, "taller images are rejected")


@row_stage(Portraits, reads=("width_px", "height_px"), rejects=("tall_portrait",))
def portraits(rows: Sequence[Row], config: Portraits) -> list[Mapping[str, Any] | Drop]:
    """Keep no image that is much higher than wide."""
    return [
        Drop("tall_portrait", f"{row['width_px']} x {row['height_px']} px")
        if row["height_px"] > config.max_height_over_width * row["width_px"]
        else {}
        for row in rows
    ]


@row_stage(adds={"warmth": pa.float32()}, batch_rows=16)
def warmth(rows: Sequence[Row], config: object) -> list[Mapping[str, Any] | Drop]:
    """Mean of red minus blue, -1 to 1: a column of its own, which the report shows and later stages may read."""
    means = [np.asarray(row.picture(side_px=64), np.float32).mean((0, 1)) / 255 for row in rows]
    return [{"warmth": float(mean[0] - mean[2])} for mean in means]
