"""What the router does: who is left out, which expert works when and where, and how much the noise level decides.

With expert choice every expert takes the same number of tokens, so there is no load to watch. These figures look at
the tokens (how many experts took each), at the routing weights (how much each expert counts) and at the logits.

All sums are additive over images, micro-batches and ranks. They lie in one fp64 vector: adding waits for nothing on
the host, and ranks sum theirs with one all_reduce.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nucleus.types import Routing

# Our own choices; the paper gives none of these figures.
LOW_SIGMA, HIGH_SIGMA = 0.3, 0.7  # below: nearly clean, above: mostly noise
DEAD_SHARE = 0.01  # an expert with less than this part of the uniform share 1/E does no work


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Routing of one MoE layer over all images added. Shares are in [0, 1].

    None = not defined on these images (no variance, no low sigma, one bin), or logits or weights that are not finite.

    layer: number of the block.
    taken_by_none, taken_by_one: share of tokens that no expert took, and exactly one.
    experts_per_token: mean. experts_per_token_shares: share of tokens taken by 0, 1, ... E experts.
    tokens_per_expert_min, tokens_per_expert_max: distinct tokens per image of the expert with the fewest and the most;
        both are the capacity C wherever all images had the same size.
    expert_mass: each expert's share of all routing weight. least_mass: the smallest, in units of 1/E (1 = as much as
        every other). dead_experts: those below `DEAD_SHARE` of 1/E.
    time_entropy, space_entropy: entropy of an expert's routing weight per token over the sigma bins, and over the
        regions of the image, divided by that of a uniform one; mean over the experts with any weight. 1 = the expert
        works at all times (everywhere) alike, 0 = in one bin (region) alone. Few images bring it down: on a single one
        an expert that takes C tokens cannot pass log(C) / log(regions).
    sigma_explained: share of a logit's variance between sigma bins (eta squared), mean over experts.
    spread: standard deviation of the logits over experts and tokens. spread_low, spread_high: the same at sigma < 0.3
        and > 0.7. spread_ratio: low / high.

    Logits are centred first: a token's mean over the experts, which a softmax does not see, is taken off.
    """

    layer: int
    taken_by_none: float
    taken_by_one: float
    experts_per_token: float
    experts_per_token_shares: tuple[float, ...]
    tokens_per_expert_min: float
    tokens_per_expert_max: float
    expert_mass: tuple[float | None, ...]
    least_mass: float | None
    dead_experts: tuple[int, ...]
    time_entropy: float | None
    space_entropy: float | None
    sigma_explained: float | None
    spread: float | None
    spread_low: float | None
    spread_high: float | None
    spread_ratio: float | None


# Fields of a layer that are one number; their mean over the layers stands in a report.
SCALARS = tuple(
    f.name for f in dataclasses.fields(LayerReport) if f.name != "layer" and f.type.startswith("float")
)


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """Plain numbers, ready for JSON through `dataclasses.asdict`.

    images, tokens: what was added (of weight 1). layers: one report each.
    mean: `SCALARS` averaged over the layers; None where a layer has None.
    dead_experts: of all layers together.
    sigma_explained_chance: what `sigma_explained` would be at most, on average, for logits that know nothing of sigma:
        (bins with images - 1) / (images - 1). A value near it says nothing. None for a single image.
    """

    images: float
    tokens: float
    layers: tuple[LayerReport, ...]
    mean: dict[str, float | None]
    dead_experts: int
    sigma_explained_chance: float | None

    def scalars(self) -> dict[str, float]:
        """Every number with its tag, ``mean/taken_by_none`` or ``layer_03/taken_by_none``; None is left out."""
        out = {f"mean/{name}": value for name, value in self.mean.items()}
        out["mean/dead_experts"] = self.dead_experts / len(self.layers)
        for layer in self.layers:
            out |= {f"layer_{layer.layer:02d}/{name}": getattr(layer, name) for name in SCALARS}
            out[f"layer_{layer.layer:02d}/dead_experts"] = len(layer.dead_experts)
        return {tag: value for tag, value in out.items() if value is not None}


class RoutingMeter:
    """Adds up routings of any number of batches and grids.

    Memory: 8 * (layers * E * (2 * sigma_bins + space_cells^2 + 3)) bytes and a little, 0.6 MB for 29 layers of 64
    experts; while adding, B * E * S bytes and a few fp32 copies of one layer's logits.

    Args:
        layers: numbers of the MoE blocks, in the order of the routings.
        experts: E.
        sigma_bins: equal parts of sigma's range [0, 1]; 1 belongs to the last.
        space_cells: the image is cut into space_cells x space_cells regions.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        experts: int,
        device: torch.device | str = "cpu",
        sigma_bins: int = 10,
        space_cells: int = 4,
    ):
        self.layers, self.experts = tuple(layers), experts
        self.sigma_bins, self.space_cells = sigma_bins, space_cells
        n, cells = len(self.layers), space_cells**2
        self._sums = FlatSums(
            {
                "images": (), "tokens_by_bin": (sigma_bins,), "tokens_by_cell": (cells,), "tokens_by_end": (2,),
                "images_by_bin": (sigma_bins,), "picked": (n, experts + 1), "rows": (n, experts),
                "mass_by_bin": (n, experts, sigma_bins), "mass_by_cell": (n, experts, cells),
                "logit_by_bin": (n, experts, sigma_bins), "logit_square": (n, experts), "spread_square": (n, 2),
            },
            device,
        )  # fmt: skip

    @torch.no_grad()
    def add(
        self,
        routings: Sequence[Routing],
        sigma_B: Tensor,
        grid: tuple[int, int],
        weights_B: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            routings: one per layer, all of the same B images of ``grid``.
            sigma_B: noise level of each image, in [0, 1].
            weights_B: 1 for an image that counts, 0 for one that fills up the batch; None = all count.

        Raises:
            ValueError: another number of layers, experts or tokens than announced.
        """
        weights_B, S = checked_weights(self.layers, routings, weights_B), grid[0] * grid[1]
        if routings[0].logits_BSE.shape[1:] != (S, self.experts):
            raise ValueError(
                f"routing logits of shape {list(routings[0].logits_BSE.shape)} for grid {grid} and {self.experts} "
                "experts"
            )
        cell_S = _cells(grid, self.space_cells, sigma_B.device)
        bin_B = (sigma_B * self.sigma_bins).long().clamp(max=self.sigma_bins - 1)  # sigma 1: the last bin
        bins_Bb = _one_hot(bin_B, self.sigma_bins) * weights_B[:, None]
        ends_B2 = torch.stack([sigma_B < LOW_SIGMA, sigma_B > HIGH_SIGMA], 1) * weights_B[:, None]
        sums = self._sums.parts
        sums["images"] += weights_B.sum()
        sums["images_by_bin"] += bins_Bb.sum(0)
        sums["tokens_by_bin"] += S * bins_Bb.sum(0)
        sums["tokens_by_end"] += S * ends_B2.sum(0)
        sums["tokens_by_cell"] += weights_B.sum() * _one_hot(cell_S, self.space_cells**2).sum(0)
        for i, routing in enumerate(routings):
            layer = {name: part[i] for name, part in sums.items() if part.ndim and name in PER_LAYER}
            _add_choices(layer, routing, S, weights_B)
            _add_mass(layer, routing, cell_S, bins_Bb, weights_B)
            _add_logits(layer, routing, bins_Bb, ends_B2, weights_B)

    def sums(self) -> Tensor:
        """One flat fp64 vector, a copy; those of several ranks (or batches) may be added."""
        return self._sums.flat.clone()

    def reset(self) -> None:
        """Back to nothing added."""
        self._sums.flat.zero_()

    def report(self, sums: Tensor) -> RoutingReport:
        """The figures of `sums`, which may be the sum of several; waits for the device.

        Raises:
            ValueError: no image was added, or a vector of another meter.
        """
        parts = self._sums.view(sums.detach().cpu())
        images = parts["images"].item()
        if images == 0:
            raise ValueError("no image was added to this routing meter")
        layers = tuple(
            _layer_report(number, {name: part[i] if name in PER_LAYER else part for name, part in parts.items()})
            for i, number in enumerate(self.layers)
        )  # fmt: skip
        used = int((parts["images_by_bin"] > 0).sum())
        return RoutingReport(
            images=images,
            tokens=parts["tokens_by_bin"].sum().item(),
            layers=layers,
            mean={name: _mean([getattr(layer, name) for layer in layers]) for name in SCALARS},
            dead_experts=sum(len(layer.dead_experts) for layer in layers),
            sigma_explained_chance=(used - 1) / (images - 1) if images > 1 else None,
        )


def taken_mask(index_BEC: Tensor, tokens: int) -> Tensor:
    """bool [B, E, S]: True where the expert took the token."""
    B, E, _ = index_BEC.shape
    taken_BES = torch.zeros(B, E, tokens, dtype=torch.bool, device=index_BEC.device)
    return taken_BES.scatter_(2, index_BEC, True)


class FlatSums:
    """Named fp64 sums that are views of one flat vector."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str):
        self.shapes = shapes
        self.flat = torch.zeros(
            sum(map(math.prod, shapes.values())), dtype=torch.float64, device=torch.device(device)
        )
        self.parts = self.view(self.flat)

    def view(self, flat: Tensor) -> dict[str, Tensor]:
        if flat.shape != self.flat.shape:
            raise ValueError(f"sums of shape {list(flat.shape)}, this meter's have {list(self.flat.shape)}")
        pieces = flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }  # fmt: skip


PER_LAYER = (
    "picked",
    "rows",
    "mass_by_bin",
    "mass_by_cell",
    "logit_by_bin",
    "logit_square",
    "spread_square",
)


def _add_choices(layer: dict[str, Tensor], routing: Routing, tokens: int, weights_B: Tensor) -> None:
    taken_BES = taken_mask(routing.index_BEC, tokens)
    picked_BS = taken_BES.sum(1)
    layer["picked"].scatter_add_(0, picked_BS.flatten(), weights_B[:, None].expand_as(picked_BS).flatten())
    layer["rows"] += weights_B @ taken_BES.sum(2).double()


def _add_mass(
    layer: dict[str, Tensor], routing: Routing, cell_S: Tensor, bins_Bb: Tensor, weights_B: Tensor
) -> None:
    weight_BEC, cells = routing.weight_BEC.double(), layer["mass_by_cell"].shape[1]
    mass_BEc = weight_BEC.new_zeros(*weight_BEC.shape[:2], cells)
    mass_BEc.scatter_add_(2, cell_S[routing.index_BEC], weight_BEC)
    layer["mass_by_cell"] += torch.einsum("bec,b->ec", mass_BEc, weights_B)
    layer["mass_by_bin"] += mass_BEc.sum(2).T @ bins_Bb


def _add_logits(
    layer: dict[str, Tensor], routing: Routing, bins_Bb: Tensor, ends_B2: Tensor, weights_B: Tensor
) -> None:
    logits_BSE = routing.logits_BSE.float()
    tokens = logits_BSE.shape[1]
    centred_BSE = logits_BSE - logits_BSE.mean(-1, keepdim=True)
    # Squares around each image's own mean first: nothing cancels in fp32.
    variance_BE, mean_BE = torch.var_mean(centred_BSE, dim=1, correction=0)
    mean_BE = mean_BE.double()
    square_BE = variance_BE.double() + mean_BE.square()
    layer["logit_by_bin"] += tokens * mean_BE.T @ bins_Bb
    layer["logit_square"] += tokens * weights_B @ square_BE
    layer["spread_square"] += tokens * square_BE.sum(1) @ ends_B2


def _layer_report(number: int, sums: dict[str, Tensor]) -> LayerReport:
    tokens, E = sums["tokens_by_bin"].sum(), sums["rows"].shape[0]
    shares = sums["picked"] / tokens
    rows = sums["rows"] / sums["images"]
    mass = sums["mass_by_bin"].sum(1)
    mass = mass / mass.sum()
    spread = (sums["spread_square"] / (sums["tokens_by_end"] * E)).sqrt()
    return LayerReport(
        layer=number,
        taken_by_none=shares[0].item(),
        taken_by_one=shares[1].item(),
        experts_per_token=(shares @ torch.arange(E + 1, dtype=torch.float64)).item(),
        experts_per_token_shares=tuple(shares.tolist()),
        tokens_per_expert_min=rows.min().item(),
        tokens_per_expert_max=rows.max().item(),
        expert_mass=tuple(_number(x) for x in mass),
        least_mass=_number(mass.min() * E),
        dead_experts=tuple((mass * E < DEAD_SHARE).nonzero().flatten().tolist()),
        time_entropy=_entropy(sums["mass_by_bin"], sums["tokens_by_bin"]),
        space_entropy=_entropy(sums["mass_by_cell"], sums["tokens_by_cell"]),
        sigma_explained=_explained(sums["logit_by_bin"], sums["logit_square"], sums["tokens_by_bin"]),
        spread=_number((sums["logit_square"].sum() / (tokens * E)).sqrt()),
        spread_low=_number(spread[0]),
        spread_high=_number(spread[1]),
        spread_ratio=_number(spread[0] / spread[1]),
    )


def _entropy(mass_En: Tensor, tokens_n: Tensor) -> float | None:
    """Mean over experts of the normalised entropy of mass per token; None with fewer than two places in use."""
    used = tokens_n > 0
    rate_En = mass_En[:, used] / tokens_n[used]
    rate_En = rate_En[rate_En.sum(1) > 0]
    if rate_En.shape[0] == 0 or rate_En.shape[1] < 2:
        return None
    share_En = rate_En / rate_En.sum(1, keepdim=True)
    entropy_E = torch.special.entr(share_En).sum(1) / math.log(rate_En.shape[1])
    return _number(entropy_E.mean())


def _explained(sum_Eb: Tensor, square_E: Tensor, tokens_b: Tensor) -> float | None:
    """Mean over experts of the variance between bins over the whole variance; None with fewer than two bins in use."""
    used = tokens_b > 0
    if used.sum() < 2:
        return None
    tokens = tokens_b.sum()
    mean_E = sum_Eb.sum(1) / tokens
    mean_Eb = sum_Eb[:, used] / tokens_b[used]
    between_E = (mean_Eb - mean_E[:, None]).square() @ tokens_b[used] / tokens
    return _number((between_E / (square_E / tokens - mean_E.square())).mean())


def checked_weights(layers: tuple[int, ...], routings: Sequence[Routing], weights_B: Tensor | None) -> Tensor:
    """Weights in fp64; ValueError where the routings are not one per layer."""
    if len(routings) != len(layers):
        raise ValueError(f"{len(routings)} routings for the {len(layers)} layers {list(layers)}")
    index_BEC = routings[0].index_BEC
    if weights_B is None:
        return torch.ones(len(index_BEC), dtype=torch.float64, device=index_BEC.device)
    return weights_B.double()


def _cells(grid: tuple[int, int], cells: int, device: torch.device) -> Tensor:
    """Region of each token: [S], row-major over cells x cells regions; a grid of fewer rows leaves some empty."""
    rows, columns = (torch.arange(n, device=device) * cells // n for n in grid)
    return (rows[:, None] * cells + columns).flatten()


def _one_hot(index: Tensor, count: int) -> Tensor:
    return (index[:, None] == torch.arange(count, device=index.device)).double()


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _number(value: Tensor) -> float | None:
    """None where it is not finite: an empty set, or logits that were not."""
    number = value.item()
    return number if math.isfinite(number) else None
