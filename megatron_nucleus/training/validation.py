"""A validation loss that can be compared: held-out images, fixed noise, equidistant noise levels.

The figure depends on the weights, the held-out images and nothing else: not on the run's seed, the step, the ranks or
the batch size (but for rounding). An image that cannot be read is never replaced or passed over: the mean would be of
other images. MLPerf's text-to-image benchmark takes the mean over 8 levels, as is the default
here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.agreement import AgreementMeter
from megatron_nucleus.core.moe.stats import RoutingMeter
from megatron_nucleus.data import buckets
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.samples import find_unreadable, load_samples
from megatron_nucleus.training.checkpointing.agreement import Ranks
from megatron_nucleus.training.losses import flow_loss_per_image
from megatron_nucleus.types import Batch, RawBatch, Routing
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, DataError

NOISE_SEED = 0  # the same noise for every run, so that runs with different seeds can be compared
MOST_NAMED = 20  # ids in one message, which every rank prints


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out images with fixed noise at equidistant noise levels."""

    valid_samples: int = knob(
        0, "images held out of training, those with the smallest ids; 0 = none", unit="images"
    )
    valid_interval_samples: int = knob(
        0, "validate whenever so many more samples were seen; 0 = after the last step only", unit="images"
    )
    valid_sigmas: int = knob(8, "noise levels (i + 0.5)/N")
    valid_batch_size: int = knob(32, "images of one forward pass on a rank", unit="images")
    valid_resolutions_px: tuple[int, ...] = knob(
        (), "more sides of the square bucket to validate at, beside the run's own", unit="px"
    )
    valid_exclude_ids: tuple[str, ...] = knob(
        (),
        "ids of held-out images to measure no loss on, as they are damaged; training does not get them either",
    )

    def __post_init__(self) -> None:
        for name in ("valid_samples", "valid_interval_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")
        for name in ("valid_sigmas", "valid_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("valid_interval_samples", "valid_exclude_ids"):
            if getattr(self, name) and not self.valid_samples:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: needs --valid-samples, the images to hold out"
                )

    def due(self, before: int, now: int) -> bool:
        """Whether an interval ended between two values of samples seen."""
        every = self.valid_interval_samples
        return bool(self.valid_samples and every and before // every < now // every)


class _Chunk(NamedTuple):
    """One forward pass of this rank. rows: of the corpus. numbers: places in the table of losses; -1 = padding."""

    resolution: int
    bucket: str
    rows: tuple[int, ...]
    numbers: tuple[int, ...]


class Validator:
    """Runs the held-out images through the model; every rank calls it together.

    Args:
        corpus: opened with ``held_out_samples = config.valid_samples``.
        resolution_px: of the run.
        control: gloo group of all ranks, None for one process.

    Raises:
        ConfigError: a resolution that does not fit, or another one than that of stored features; ids to leave out
            that are not held out, or all of them.
    """

    def __init__(
        self,
        config: ValidationConfig,
        corpus: Corpus,
        extractor: FeatureExtractor,
        *,
        resolution_px: int,
        bf16: bool,
        rank: int,
        world: int,
        control: dist.ProcessGroup | None,
    ):
        self.config, self.corpus, self.extractor = config, corpus, extractor
        self.resolutions = tuple(dict.fromkeys((resolution_px, *config.valid_resolutions_px)))
        self.bf16, self.ranks = bf16, Ranks(control)
        self.rank, self.world = rank, world
        self.rows = _measured_rows(corpus, config.valid_exclude_ids)
        if corpus.encoded is None:
            for px in self.resolutions:
                buckets.size(buckets.BUCKETS[0], px, extractor.multiple_px)
        elif len(self.resolutions) > 1:
            raise ConfigError(
                f"--valid-resolutions-px {' '.join(map(str, config.valid_resolutions_px))}: stored features have "
                "one resolution; leave it out"
            )
        self.sigmas = [(i + 0.5) / config.valid_sigmas for i in range(config.valid_sigmas)]

    def check(self) -> None:
        """Read and decode every image that `run` will, on the rank that will; all ranks call it together.

        For before the first step: damage found at a validation costs the run its time. It takes less than one
        validation, which decodes the same images on the same ranks, at every resolution, and needs no model.

        Raises:
            DataError: what cannot be read, the same on all ranks, and how to go on without it.
        """
        mine = sorted({row for chunk in self._chunks() for row in chunk.rows})
        px, multiple_px = self.resolutions[0], self.extractor.multiple_px
        found = self.ranks.on_all(lambda: find_unreadable(self.corpus, mine, px, multiple_px))
        damaged = {id: message for part in found for id, message in part.items()}
        if damaged:
            ids = " ".join([*self.config.valid_exclude_ids, *list(damaged)[:MOST_NAMED]])
            more = f" (the first {MOST_NAMED}; then come others)" if len(damaged) > MOST_NAMED else ""
            raise DataError(
                f"{len(damaged)} of {len(self.rows)} held-out images cannot be read: {next(iter(damaged.values()))}; "
                f"where what is lost stays lost, measure the others alone: --valid-exclude-ids {ids}{more}"
            )

    @torch.no_grad()
    def run(self, model: torch.nn.Module) -> dict:
        """Figures for a row of metrics.jsonl (see `_report`).

        Bytes: one all-reduce of 8 per image and level, and one small all-gather per chunk.

        Raises:
            DataError: an image that one rank cannot read, the same on all ranks.
        """
        device, count = self.extractor.device, len(self.rows)
        losses = torch.zeros(len(self.resolutions), count, len(self.sigmas), dtype=torch.float64)
        routing = _RoutingProbe(model.shape, self.sigmas, device)
        was_training = model.training
        model.eval()
        for chunk in self._chunks():
            batch, noise_BSP = self._load(chunk)
            weights_B = torch.tensor([float(n >= 0) for n in chunk.numbers], device=device)
            for level, sigma in enumerate(self.sigmas):
                sigma_B = torch.full((len(chunk.rows),), sigma, device=device)
                losses_B, routings = self._forward(model, batch, noise_BSP, sigma_B)
                self._note(losses, chunk, level, losses_B)
                routing.add(level, routings, sigma_B, batch.grid, weights_B)
        model.train(was_training)
        return self._report(self._sum(losses)) | routing.report(self._sum)

    def _chunks(self) -> Iterator[_Chunk]:
        """This rank's passes: the same number of images of the same bucket on every rank, padded by repetition."""
        size = self.config.valid_batch_size
        place = {row: number for number, row in enumerate(self.rows)}
        for resolution in range(len(self.resolutions)):
            for bucket, rows in self._by_bucket().items():
                per_rank = min(size, math.ceil(len(rows) / self.world))
                for start in range(0, len(rows), per_rank * self.world):
                    low = start + self.rank * per_rank
                    places = [i if i < len(rows) else -1 for i in range(low, low + per_rank)]
                    chosen = tuple(rows[i] for i in places)
                    numbers = tuple(
                        place[row] if i >= 0 else -1 for row, i in zip(chosen, places, strict=True)
                    )
                    yield _Chunk(resolution, bucket, chosen, numbers)

    def _by_bucket(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for row in self.rows:
            found.setdefault(self.corpus.bucket(row), []).append(row)
        return found

    def _load(self, chunk: _Chunk) -> tuple[Batch, Tensor]:
        """The images of a chunk, and each one's own noise: a function of its id and size.

        The ranks agree that all have read theirs: one that raised alone would leave the others in the forward pass.
        """
        px, multiple_px = self.resolutions[chunk.resolution], self.extractor.multiple_px
        taken: list[RawBatch] = []
        self.ranks.on_all(
            lambda: taken.append(load_samples(self.corpus, chunk.rows, chunk.rows, px, multiple_px))
        )
        batch = self.extractor.extract(taken[0])
        keys = [int(self.corpus.id(row)[:15], 16) for row in chunk.rows]
        shape = tuple(batch.latents_BSP.shape[1:])
        noise_BSP = rng.normal_batch(NOISE_SEED, keys, "validation noise", shape)
        return batch, noise_BSP.to(self.extractor.device)

    def _forward(self, model, batch: Batch, noise_BSP: Tensor, sigma_B: Tensor) -> tuple[Tensor, list]:
        clean_BSP = batch.latents_BSP
        with torch.autocast(clean_BSP.device.type, torch.bfloat16, enabled=self.bf16):
            noisy_BSP = flow.add_noise(clean_BSP, noise_BSP, sigma_B)
            velocity_BSP, routings = model(noisy_BSP, sigma_B, batch.text, batch.grid, return_routing=True)
        return flow_loss_per_image(velocity_BSP, flow.velocity_target(clean_BSP, noise_BSP)), routings

    def _note(self, losses: Tensor, chunk: _Chunk, level: int, losses_B: Tensor) -> None:
        for number, loss in zip(chunk.numbers, losses_B.double().tolist(), strict=True):
            if number >= 0:
                losses[chunk.resolution, number, level] = loss

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on the host; where one rank alone holds a value, its bits stay."""
        values = values.cpu()
        if self.ranks.group is not None:
            dist.all_reduce(values, group=self.ranks.group)
        return values

    def _report(self, losses: Tensor) -> dict:
        """Means of fp64 [resolutions, images, levels].

        ``valid_loss`` is the mean at the run's own resolution; the others are keyed by noise level, side in px,
        aspect bucket and tier ("-": images without one). ``valid_samples``: images measured.
        """
        rows, first = self.rows, losses[0]
        return {
            "valid_loss": first.mean().item(),
            "valid_loss_by_sigma": {
                f"{sigma:.4g}": first[:, i].mean().item() for i, sigma in enumerate(self.sigmas)
            },
            "valid_loss_by_resolution": {
                str(px): losses[i].mean().item() for i, px in enumerate(self.resolutions)
            },
            "valid_loss_by_bucket": _means(first, [self.corpus.bucket(row) for row in rows]),
            "valid_loss_by_tier": _means(first, [self.corpus.tier(row) or "-" for row in rows]),
            "valid_samples": len(rows),
        }


def _measured_rows(corpus: Corpus, excluded: Sequence[str]) -> list[int]:
    """Held-out rows without those of the ids to leave out."""
    ids = {row: corpus.id(row) for row in corpus.held_out}
    for name in excluded:
        if name not in ids.values():
            raise ConfigError(f"--valid-exclude-ids {name}: no held-out image of {corpus.root} has this id")
    rows = [row for row, name in ids.items() if name not in excluded]
    if not rows:
        raise ConfigError(
            f"--valid-exclude-ids: leaves none of the {len(ids)} held-out images to validate on"
        )
    return rows


def _means(losses: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Mean of fp64 [images, levels] over the images of each group, by name."""
    out = {}
    for group in sorted(set(groups)):
        members = [i for i, name in enumerate(groups) if name == group]
        out[group] = losses[members].mean().item()
    return out


class _RoutingProbe:
    """What the routers do with the same images at every noise level; nothing for a model without MoE layers."""

    def __init__(self, shape: ModelShape, sigmas: Sequence[float], device: torch.device):
        layers = tuple(i for i in range(shape.num_layers) if shape.is_moe(i))
        self.meter = RoutingMeter(layers, shape.num_experts, device, len(sigmas)) if layers else None
        self.agreement = AgreementMeter(layers, sigmas, device) if layers and len(sigmas) > 1 else None
        self._levels: list[list[Routing]] = []

    def add(
        self, level: int, routings: list[Routing], sigma_B: Tensor, grid: tuple[int, int], weights_B: Tensor
    ) -> None:
        """Take in one level of one chunk; levels come in order."""
        if self.meter is None:
            return
        self.meter.add(routings, sigma_B, grid, weights_B)
        if self.agreement is not None:
            # Agreement reads the choices alone; the logits of all levels would take gigabytes at 1024 px.
            self._levels.append([r._replace(logits_BSE=r.logits_BSE[..., :0].clone()) for r in routings])
            if level == len(self.agreement.levels) - 1:
                self.agreement.add(self._levels, weights_B)
                self._levels = []

    def report(self, total: Callable[[Tensor], Tensor]) -> dict:
        """Entries of the row. total: sums a tensor over all ranks."""
        if self.meter is None:
            return {}
        out = self.meter.report(total(self.meter.sums())).scalars()
        if self.agreement is not None:
            levels, mean = self.agreement.levels, self.agreement.report(total(self.agreement.sums())).mean
            out |= {
                f"mean/agreement/{a:.4g}-{b:.4g}": kept
                for (a, b), kept in zip(itertools.pairwise(levels), mean.neighbours, strict=True)
            }
            out |= {
                "mean/agreement_neighbours": sum(mean.neighbours) / len(mean.neighbours),
                "mean/agreement_ends": mean.ends,
                "mean/agreement_chance": mean.chance,
            }
        return {"valid_routing": out}
