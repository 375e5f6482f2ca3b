"""Pictures that show nothing (solid, or solid but for noise), and pictures that are almost all one colour.

The published recipe rejects blank and monochrome pictures "by colour histogram" without a threshold: the limits are
our own choice. *Monochrome* is taken to mean one colour, not black and white: the histogram of a greyscale or sepia
photograph spreads over many lightnesses, and such a picture stays. What falls is a page with one line of text, a small
logo on white, a few stars on black; and a picture so low in contrast that 98 % of it fit into 32 levels of 256.

Of 16 photographs the lowest spread of luminance is 13 levels and the largest share of one colour 0.94 (a flat grey
moonscape; galaxies on black have 0.91). Run it before hashes are compared: blank pictures are all alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_nucleus.data.curation.measures import ONE_LIGHTNESS_SHARE
from megatron_nucleus.data.curation.stage import Drop, Row, row_stage
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

# More than 5 % of the pixels 16 levels away from the mean make a spread of 3.6 levels: below it, colour is measured.
_MAX_LUMA_STD = 3.5


@dataclasses.dataclass(frozen=True)
class BlankConfig:
    """How empty a picture may be."""

    min_luma_std: float = knob(3.5, "pictures below this and min_chroma_std are blank", unit="levels of 256")
    min_chroma_std: float = knob(4.0, "pictures below this and min_luma_std are blank", unit="levels of 256")
    max_dominant_share: float = knob(
        0.98, "share of pixels within one colour (32 levels a channel)", unit="0-1"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_luma_std <= _MAX_LUMA_STD:
            raise ConfigError(f"min_luma_std {self.min_luma_std}: 0 (none is blank) to {_MAX_LUMA_STD}")
        if not 0 <= self.min_chroma_std <= 128:
            raise ConfigError(f"min_chroma_std {self.min_chroma_std}: 0 (none is blank) to 128")
        if not ONE_LIGHTNESS_SHARE <= self.max_dominant_share <= 1:
            raise ConfigError(
                f"max_dominant_share {self.max_dominant_share}: {ONE_LIGHTNESS_SHARE} to 1 (no limit)"
            )


@row_stage(
    BlankConfig,
    reads=("luma_std", "chroma_std", "dominant_colour_share"),
    rejects=("blank", "near_monochrome"),
    batch_rows=1024,
)
def blank(rows: Sequence[Row], config: BlankConfig) -> list[dict[str, Any] | Drop]:
    """Drop pictures that show nothing, or almost nothing but one colour."""
    return [_judge(row, config) for row in rows]


def _judge(row: Row, config: BlankConfig) -> dict[str, Any] | Drop:
    luma, chroma, share = row["luma_std"], row["chroma_std"], row["dominant_colour_share"]
    if chroma is None or share is None:  # too many lightnesses for either
        return {}
    if luma < config.min_luma_std and chroma < config.min_chroma_std:
        limits = f"min_luma_std {config.min_luma_std:g}, min_chroma_std {config.min_chroma_std:g}"
        return Drop("blank", f"luma_std {luma:.2f}, chroma_std {chroma:.2f} levels; {limits}")
    if share > config.max_dominant_share:
        limit = f"max_dominant_share {config.max_dominant_share:g}"
        return Drop("near_monochrome", f"{share:.1%} of it one colour; {limit}")
    return {}
