"""Pictures without fine detail: out of focus, moved, or enlarged from something much smaller.

Two measures must agree, because each errs alone: the variance of the Laplacian is low in a sharp picture of low
contrast, the share of high frequencies in a sharp picture of one strong edge. Both are taken as if the picture's
shortest side were 256 px (`measures`), so what counts is blur that shows at that size: a Gaussian of 0.8 % of the
shortest side (8 px at 1024 px) is found in every photograph of the tests, one of 0.4 % in some, a softness of 1 or 2 px
at 1024 px in none. One sharp object before a blurred background is enough to stay. A smooth gradient and soft abstract
art count as blurry, and so does a drawing in colours that are all equally light: only luminance is looked at.

The published recipe names both measures and no thresholds: ours are measured. 16 sharp photographs at six sizes have
a variance from 104 and a share from 0.0024; blurred by 0.8 % at most 21 and 0.0005. Of the same photographs enlarged
from 64 px 15 of 16 fall, from 128 px one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_nucleus.data.curation.stage import Drop, Row, row_stage
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

# Rounding to whole levels alone has a variance of 20 / 12, and a high share where there is nothing else: below this
# variance there is no detail to have a share of.
_ROUNDING = 5.0


@dataclasses.dataclass(frozen=True)
class BlurConfig:
    """How soft a picture may be: it is dropped below both limits."""

    min_laplacian_variance: float = knob(50.0, "of luminance at shortest side 256 px", unit="levels^2")
    min_high_frequency_share: float = knob(
        0.002, "energy above 0.25 cycles per px at shortest side 256 px, of all", unit="0-1"
    )

    def __post_init__(self) -> None:
        if not self.min_laplacian_variance >= 0:
            raise ConfigError(
                f"min_laplacian_variance {self.min_laplacian_variance}: 0 (none is blurry) or more"
            )
        if not 0 <= self.min_high_frequency_share <= 1:
            raise ConfigError(f"min_high_frequency_share {self.min_high_frequency_share}: 0 (none) to 1")


@row_stage(
    BlurConfig,
    reads=("laplacian_variance", "high_frequency_share"),
    rejects=("blurry",),
    batch_rows=1024,
)
def blur(rows: Sequence[Row], config: BlurConfig) -> list[dict[str, Any] | Drop]:
    """Drop pictures that have hardly any fine detail."""
    return [_judge(row, config) for row in rows]


def _judge(row: Row, config: BlurConfig) -> dict[str, Any] | Drop:
    variance, share = row["laplacian_variance"], row["high_frequency_share"]
    soft = variance < _ROUNDING or share < config.min_high_frequency_share
    if variance < config.min_laplacian_variance and soft:
        limits = f"limits {config.min_laplacian_variance:g} and {config.min_high_frequency_share:g}"
        return Drop(
            "blurry", f"laplacian_variance {variance:.1f}, high_frequency_share {share:.5f}; {limits}"
        )
    return {}
