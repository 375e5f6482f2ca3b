"""Batches for training: plan -> indexed reads -> decode -> `RawBatch`, in worker processes, in a fixed order.

A sample depends on (seed, step, its position in the step) alone: not on the number of workers, the micro-batch,
the rank or the point where a run was resumed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
import math
import os
import time
import weakref
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset

from megatron_nucleus.data import decoders
from megatron_nucleus.data.ahead import Ahead
from megatron_nucleus.data.batching import batch_samples, bucket_sizes
from megatron_nucleus.data.curriculum import CAPTION_CLASSES, CurriculumConfig
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.mixture import CaptionCurve, CaptionMix, Mixture, corpus_mixture
from megatron_nucleus.data.planner import Planner, StepPlan
from megatron_nucleus.data.samples import DROPPED, Job, Made, SampleMaker
from megatron_nucleus.data.workers import Batches, deaths_told_by_next, start_worker, stop_signals_held
from megatron_nucleus.types import RawBatch
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, DataError, UserError

_NO_CURRICULUM = CurriculumConfig()
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are drawn."""

    data_path: str = knob(help="data set folder made by tools/curate.py or tools/encode.py")
    resolution_px: int = knob(
        256, "side of the square bucket; other buckets keep its area. Ignored for encoded data", unit="px"
    )
    caption_short_weight: float = knob(1.0, "share of short captions; classes an image lacks are left out")
    caption_medium_weight: float = knob(1.0, "share of medium captions")
    caption_detailed_weight: float = knob(1.0, "share of detailed captions")
    caption_drop_frac: float = knob(0.1, "share of samples that get the empty caption, for guidance")
    bucket_batch_multiple: int | None = knob(
        None,
        "every bucket draws as many images per step as have the tokens of a global batch of square ones, rounded to "
        "this multiple (of ranks x micro-batches per step); none: every bucket draws the global batch",
        unit="images",
    )
    num_workers: int = knob(2, "processes that read and decode; 0: in the training process", unit="processes")
    prefetch_batches: int = knob(4, "micro-batches each worker prepares ahead", unit="micro-batches")
    image_decoder: str = knob(
        decoders.PILLOW,
        "what decodes training images; dali: NVIDIA DALI in every worker; dali_mixed: DALI with this rank's GPU, in a "
        "thread of the training process. Held-out images go through pillow",
        choices=decoders.DECODERS,
    )

    def __post_init__(self) -> None:
        keys = {f"data.caption_{name}_weight": weight for name, weight in self.caption_weights().items()}
        for key, weight in keys.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"{key} {weight}: must be finite and 0 or more")
        if not any(keys.values()):
            raise ConfigError(f"{', '.join(keys)}: all are 0; at least one must be above 0")
        if not 0 <= self.caption_drop_frac <= 1:
            raise ConfigError(f"caption_drop_frac {self.caption_drop_frac}: between 0 and 1")
        if self.bucket_batch_multiple is not None and self.bucket_batch_multiple < 1:
            raise ConfigError(f"bucket_batch_multiple {self.bucket_batch_multiple}: at least 1, or none")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers {self.num_workers}: 0 or more")
        if self.prefetch_batches < 1:
            raise ConfigError(f"prefetch_batches {self.prefetch_batches}: 1 or more")
        if self.resolution_px < 1:
            raise ConfigError(f"resolution_px {self.resolution_px}: at least 1")
        if self.image_decoder == decoders.DALI_MIXED and self.num_workers:
            raise ConfigError(
                f"image_decoder {self.image_decoder}: decodes in the training process, which has the GPU, not in "
                f"{self.num_workers} workers; use --num-workers 0"
            )

    def caption_weights(self) -> dict[str, float]:
        """Length class -> weight, not normalised."""
        return {
            "short": self.caption_short_weight,
            "medium": self.caption_medium_weight,
            "detailed": self.caption_detailed_weight,
        }


class Loader:
    """Endless iterator of `RawBatch`, one per micro-batch; see `build_loader`.

    Attributes:
        substituted: unreadable samples of this rank replaced so far. planner: what decides the draws.
    """

    def __init__(self, jobs: Iterator[Job], maker: SampleMaker, config: DataConfig, planner: Planner):
        self.planner, self.substituted = planner, 0
        self._mixture = _empty_mixture()
        # Given to the workers, not handed out yet.
        self._waiting: collections.deque[Job] = collections.deque()
        jobs = _remember(jobs, self._waiting)
        workers = config.num_workers
        loader = DataLoader(
            _Jobs(jobs, maker) if workers == 0 else maker,
            sampler=None if workers == 0 else _JobSampler(jobs),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.prefetch_batches if workers else None,
            worker_init_fn=functools.partial(start_worker, parent=os.getpid()),
            collate_fn=_identity,
            generator=torch.Generator(),  # else DataLoader draws from the run's global generator
        )
        self._waited_s = 0.0
        with stop_signals_held(), deaths_told_by_next():
            batches = iter(loader)  # starts the workers
            if maker.decoder is not None and maker.decoder.own_thread:
                batches = Ahead(batches, config.prefetch_batches)
            self._batches = Batches(batches)
        weakref.finalize(self, self._batches.stop).atexit = False  # the order at exit matters: see `Batches`

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> RawBatch:
        started = time.perf_counter()
        try:
            made = next(self._batches.iterator)
        except KeyboardInterrupt:
            self.close()  # a batch may have been lost on the way: going on would wait for it
            raise
        except (RuntimeError, OSError, EOFError) as error:  # what DataLoader raises depends on the moment
            lost = self._batches.why_lost()
            if lost is None:
                raise
            self.close()
            raise UserError(lost) from error
        self._waited_s += time.perf_counter() - started
        if isinstance(made, DataError):
            raise made
        for problem in made.problems:
            log.warning("sample replaced: %s", problem)
        self.substituted += len(made.problems)
        self._count(self._waiting.popleft(), made)
        return made.batch

    def take_mixture(self) -> dict:
        """What was drawn since the last call: by all ranks as planned, and by this rank as it was read.

        Returns:
            ``samples``: images of the steps whose first micro-batch was handed out, over all ranks.
            ``cells``: of these, how many per cell (``{"A1/B2": n}``; empty without a curriculum).
            ``captions``: samples of this rank by caption, ``{"short", "medium", "detailed", "dropped"}``; an image
            without any caption counts as dropped.
        """
        taken, self._mixture = self._mixture, _empty_mixture()
        return {name: dict(sorted(v.items())) if name == "cells" else v for name, v in taken.items()}

    def take_waited_s(self) -> float:
        """Seconds since the last call that ``next`` took to hand out micro-batches."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Stop the workers. Also happens when the loader is dropped and at exit."""
        self._batches.stop()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, job: Job, made: Made) -> None:
        for name, count in made.captions.items():
            self._mixture["captions"][name] = self._mixture["captions"].get(name, 0) + count
        if job.cells is not None:
            self._mixture["samples"] += job.step_samples
            for name, count in job.cells.items():
                self._mixture["cells"][name] = self._mixture["cells"].get(name, 0) + count


def _remember(jobs: Iterator[Job], waiting: collections.deque[Job]) -> Iterator[Job]:
    for job in jobs:
        waiting.append(job)
        yield job


def _empty_mixture() -> dict:
    return {"samples": 0, "cells": {}, "captions": dict.fromkeys((*CAPTION_CLASSES, DROPPED), 0)}


def build_loader(
    config: DataConfig,
    corpus: Corpus,
    *,
    curriculum: CurriculumConfig = _NO_CURRICULUM,
    seed: int,
    global_batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    start_samples: int = 0,
    multiple_px: int = 16,
) -> Loader:
    """Batches from ``start_samples`` on, for one rank.

    A step's images lie in one aspect bucket; rank r takes the r-th of ``world`` equal slices and gets it as
    ``accumulation`` consecutive micro-batches. How many images that are depends on the bucket alone
    (`batching.batch_samples`), what they are on (seed, step) alone (`data/planner.py`). A dropped caption is "". An
    unreadable sample is replaced by another of its cell or bucket, decided by (seed, draw), and counted in
    ``substituted``.

    A run goes on at the first step before which ``start_samples`` have been drawn; after a change of the batch size
    or of the data that is the nearest step not yet taken, and the draws go on counting from ``start_samples``.

    Args:
        curriculum: mixture of tiers, episode buckets and captions over the images seen; none by default.
        start_samples: samples consumed so far. multiple_px: codec stride x patch size (images only).

    Raises:
        ConfigError: batch sizes that do not divide, a rank outside the world, a resolution that does not fit, a
            curriculum that the data cannot follow.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is outside 0..{world - 1}")
    mixture = check_draws(config, corpus, curriculum, global_batch_size, accumulation, world)
    drawn = batch_samples(
        corpus, config.resolution_px, multiple_px, global_batch_size, config.bucket_batch_multiple
    )
    planner = Planner(corpus.buckets, seed, drawn, mixture)
    _warn_of_small_buckets(corpus, drawn)
    if mixture is not None:
        mixture.warn()
    sizes = {}
    if corpus.encoded is None:
        found = bucket_sizes(corpus, config.resolution_px, multiple_px)
        sizes = {b: (size.width_px, size.height_px) for b, size in found.items()}
    phases = curriculum.phases.phases if curriculum.phases is not None else ()
    captions = CaptionCurve(
        CaptionMix(**config.caption_weights(), drop_frac=config.caption_drop_frac), phases
    )
    first_step = planner.step_at(start_samples)
    decoder = decoders.open_decoder(config.image_decoder, corpus)
    jobs = _jobs(planner, captions, corpus.start, (rank, world, accumulation), first_step, start_samples)
    maker = SampleMaker(corpus, seed, sizes, decoder)
    return Loader(jobs, maker, config, planner)


def check_draws(
    config: DataConfig,
    corpus: Corpus,
    curriculum: CurriculumConfig,
    global_batch_size: int,
    accumulation: int,
    world: int,
) -> Mixture | None:
    """Refuse draws that `build_loader` would refuse, but for the resolution; needs neither model nor encoders.

    Returns:
        the curriculum on this corpus; None without one.

    Raises:
        ConfigError: batch sizes that do not divide, a curriculum that the data cannot follow, a decoder that cannot
            run.
    """
    decoders.open_decoder(config.image_decoder, corpus)
    if accumulation < 1:
        raise ConfigError(f"accumulation {accumulation}: at least 1 micro-batch per step")
    _check_divides(config, global_batch_size, accumulation, world)
    return corpus_mixture(curriculum, corpus)


def _check_divides(config: DataConfig, global_batch_size: int, accumulation: int, world: int) -> None:
    pieces, multiple = accumulation * world, config.bucket_batch_multiple
    flag, value = "--global-batch-size", global_batch_size
    if value < 1:
        raise ConfigError(f"{flag} {value}: at least 1")
    if multiple is not None:
        flag, value = "--bucket-batch-multiple", multiple
    if value % pieces:
        fitting = max(1, round(value / pieces)) * pieces
        raise ConfigError(
            f"{flag} {value} is not a multiple of {world} data-parallel ranks x {accumulation} micro-batches per step; "
            f"use {fitting}, or other micro-batches"
        )


def _warn_of_small_buckets(corpus: Corpus, drawn: dict[str, int]) -> None:
    for bucket, count in corpus.buckets.items():
        if count < drawn[bucket]:
            log.warning(
                "bucket %s has %d images, fewer than a global batch of %d: images repeat within a batch",
                *(bucket, count, drawn[bucket]),
            )


def _jobs(
    planner: Planner,
    captions: CaptionCurve,
    start: dict[str, int],
    place: tuple[int, int, int],
    first_step: int,
    start_samples: int,
) -> Iterator[Job]:
    """Micro-batches of one rank. start: first row of every bucket. place: (rank, world, accumulation)."""
    rank, world, accumulation = place
    skipped = start_samples - planner.samples_before(first_step)  # 0 unless batch sizes changed
    passes: dict[str, int] = {}
    for step in itertools.count(first_step):
        plan = planner.plan(step)
        _report_passes(plan, passes)
        total = len(plan.rows)
        micro = total // (world * accumulation)
        mix = captions.at(plan.samples_before)
        cells: dict[str, int] | None = {share.cell: share.samples for share in plan.streams if share.cell}
        for number in range(rank * accumulation, (rank + 1) * accumulation):
            slots = range(number * micro, (number + 1) * micro)
            rows = (plan.rows[slots.start : slots.stop] + start[plan.bucket]).tolist()
            first_draw = plan.samples_before + skipped + slots.start
            draws = tuple(range(first_draw, first_draw + micro))
            by_cell = bool(plan.streams[0].cell)
            yield Job(step, plan.bucket, tuple(rows), draws, slots.start, total, mix, by_cell, cells)
            cells = None


def _report_passes(plan: StepPlan, passes: dict[str, int]) -> None:
    """Log pass 2, 4, 8, ... of every stream: a small set must not fill the log."""
    for share in plan.streams:
        if share.epoch + 1 >= 2 * passes.get(share.name, 1):
            passes[share.name] = share.epoch + 1
            text = "step %d: bucket %s is in pass %d over its images"
            log.info(text, plan.step, share.name, share.epoch + 1)


class _JobSampler:
    """Hands the endless job sequence to the DataLoader, which spreads it over workers and keeps the order."""

    def __init__(self, jobs: Iterator[Job]):
        self._jobs = jobs

    def __iter__(self) -> Iterator[Job]:
        return self._jobs


class _Jobs(IterableDataset):
    """The same without workers."""

    def __init__(self, jobs: Iterator[Job], maker: SampleMaker):
        self._jobs, self._maker = jobs, maker

    def __iter__(self) -> Iterator[Made | DataError]:
        return (self._maker[job] for job in self._jobs)


def _identity(value: object) -> object:
    return value
