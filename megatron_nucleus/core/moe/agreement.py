"""How much of the experts' choices stays when the noise level changes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nucleus.core.moe.stats import FlatSums, checked_weights, taken_mask
from megatron_nucleus.types import Routing


class Agreement(NamedTuple):
    """share: mean over images and experts of the share of an expert's tokens that it takes both times; fp64 scalar.

    chance: the same for choices at random, C / S.
    """

    share: Tensor
    chance: float


@torch.no_grad()
def choice_agreement(index_a_BEC: Tensor, index_b_BEC: Tensor, tokens: int) -> Agreement:
    """How much of each expert's choice stays between two noise levels of the same images.

    Both choices have C tokens, so the share o of common ones says as much as their Jaccard index, o / (2 - o), and
    has a plain expectation: C / S.

    Args:
        tokens: S.
    """
    share = _common_B(index_a_BEC, index_b_BEC, tokens).mean()
    return Agreement(share, index_a_BEC.shape[2] / tokens)


@dataclasses.dataclass(frozen=True)
class LayerAgreement:
    """`choice_agreement` of one layer (its number, -1 for the mean over layers).

    neighbours: between each level and the next. ends: between the first and the last. chance: C / S.
    """

    layer: int
    neighbours: tuple[float, ...]
    ends: float
    chance: float


@dataclasses.dataclass(frozen=True)
class AgreementReport:
    """Agreement of choices between noise levels of the same images; ready for JSON through `dataclasses.asdict`."""

    levels: tuple[float, ...]
    images: float
    layers: tuple[LayerAgreement, ...]
    mean: LayerAgreement


class AgreementMeter:
    """Adds up `choice_agreement` over batches; sums as of `RoutingMeter`.

    Args:
        layers: numbers of the MoE blocks, in the order of the routings.
        levels: noise levels that the same images are routed at, two at least, in order.
    """

    def __init__(self, layers: tuple[int, ...], levels: Sequence[float], device: torch.device | str = "cpu"):
        if len(levels) < 2:
            raise ValueError(f"agreement needs at least two noise levels, got {list(levels)}")
        self.layers, self.levels = tuple(layers), tuple(levels)
        n = len(self.layers)
        # common: between neighbours, then between the ends
        self._sums = FlatSums({"images": (), "common": (n, len(self.levels)), "chance": (n,)}, device)

    @torch.no_grad()
    def add(self, routings: Sequence[Sequence[Routing]], weights_B: Tensor | None = None) -> None:
        """Add one batch: for every level the routings of all layers, of the same B images.

        weights_B: as of `RoutingMeter.add`.

        Raises:
            ValueError: another number of levels or layers than announced.
        """
        if len(routings) != len(self.levels):
            raise ValueError(f"routings of {len(routings)} noise levels for {len(self.levels)}")
        for level in routings:
            weights_B = checked_weights(self.layers, level, weights_B)
        pairs = [*itertools.pairwise(routings), (routings[0], routings[-1])]
        self._sums.parts["images"] += weights_B.sum()
        for i in range(len(self.layers)):
            S, C = routings[0][i].logits_BSE.shape[1], routings[0][i].index_BEC.shape[2]
            common = [_common_B(a[i].index_BEC, b[i].index_BEC, S) @ weights_B for a, b in pairs]
            self._sums.parts["common"][i] += torch.stack(common)
            self._sums.parts["chance"][i] += C / S * weights_B.sum()

    def sums(self) -> Tensor:
        """One flat fp64 vector, a copy; those of several ranks (or batches) may be added."""
        return self._sums.flat.clone()

    def reset(self) -> None:
        """Back to nothing added."""
        self._sums.flat.zero_()

    def report(self, sums: Tensor) -> AgreementReport:
        """The figures of `sums`; ValueError when no image was added."""
        parts = self._sums.view(sums.detach().cpu())
        images = parts["images"].item()
        if images == 0:
            raise ValueError("no image was added to this agreement meter")
        common, chance = parts["common"] / images, parts["chance"] / images
        rows = zip((*self.layers, -1), _with_mean(common).tolist(), _with_mean(chance).tolist(), strict=True)
        *layers, mean = (LayerAgreement(layer, tuple(c[:-1]), c[-1], r) for layer, c, r in rows)
        return AgreementReport(self.levels, images, tuple(layers), mean)


def _common_B(index_a_BEC: Tensor, index_b_BEC: Tensor, tokens: int) -> Tensor:
    """Per image, mean over experts of the share of common tokens: fp64 [B]."""
    common_BES = taken_mask(index_a_BEC, tokens) & taken_mask(index_b_BEC, tokens)
    return common_BES.sum(2).double().mean(1) / index_a_BEC.shape[2]


def _with_mean(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.mean(0, keepdim=True)])
