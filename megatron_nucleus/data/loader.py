"""Batches for training: plan -> indexed reads -> decode -> `RawBatch`, in worker processes, in a fixed order.

A sample depends on (seed, sample ordinal) alone: not on the number of workers, the micro-batch, the rank or
the point where a run was resumed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import logging
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from megatron_nucleus.data import buckets, images
from megatron_nucleus.data.dataset import Corpus, StoredSample, unpack_features
from megatron_nucleus.data.planner import Planner
from megatron_nucleus.types import Caption, RawBatch, TextFeatures
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, DataError

LENGTH_CLASSES = ("short", "medium", "detailed")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SUBSTITUTE_ATTEMPTS = 16
_GRACE_S = 120  # a worker told to end lives on this long, so that the program can finish its step and save
Made = tuple[RawBatch, list[str]] | DataError
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
    num_workers: int = knob(2, "processes that read and decode; 0: in the training process", unit="processes")
    prefetch_batches: int = knob(4, "micro-batches each worker prepares ahead", unit="micro-batches")

    def __post_init__(self) -> None:
        weights = self.caption_weights()
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ConfigError(
                f"caption weights {weights}: none may be negative, and their sum must be above 0"
            )
        if not 0 <= self.caption_drop_frac <= 1:
            raise ConfigError(f"caption_drop_frac {self.caption_drop_frac}: between 0 and 1")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers {self.num_workers}: 0 or more")
        if self.prefetch_batches < 1:
            raise ConfigError(f"prefetch_batches {self.prefetch_batches}: 1 or more")
        if self.resolution_px < 1:
            raise ConfigError(f"resolution_px {self.resolution_px}: at least 1")

    def caption_weights(self) -> dict[str, float]:
        """Length class -> weight, not normalised."""
        return {
            "short": self.caption_short_weight,
            "medium": self.caption_medium_weight,
            "detailed": self.caption_detailed_weight,
        }


class Job(NamedTuple):
    """One micro-batch to make. rows: rows of the corpus. draws: sample ordinals of the run."""

    step: int
    bucket: str
    rows: tuple[int, ...]
    draws: tuple[int, ...]


class Loader:
    """Endless iterator of `RawBatch`, one per micro-batch; see `build_loader`.

    Attributes:
        substituted: unreadable samples replaced so far. planner: what decides the draws.
    """

    def __init__(self, jobs: Iterator[Job], maker: _BatchMaker, config: DataConfig, planner: Planner):
        self.planner, self.substituted = planner, 0
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
        with _stop_signals_held():
            self._batches = _Batches(iter(loader))  # starts the workers
        weakref.finalize(self, self._batches.stop).atexit = False  # the order at exit matters: see _Batches

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> RawBatch:
        try:
            made = next(self._batches.iterator)
        except KeyboardInterrupt:
            self.close()  # a batch may have been lost on the way: going on would wait for it
            raise
        if isinstance(made, DataError):
            raise made
        batch, problems = made
        for problem in problems:
            log.warning("sample replaced: %s", problem)
        self.substituted += len(problems)
        return batch

    def close(self) -> None:
        """Stop the workers. Also happens when the loader is dropped and at exit."""
        self._batches.stop()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_loader(
    config: DataConfig,
    corpus: Corpus,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    start_samples: int = 0,
    multiple_px: int = 16,
) -> Loader:
    """Batches from ``start_samples`` on, for one rank.

    A step's global batch lies in one aspect bucket; rank r takes the r-th of ``world`` equal slices and gets
    it as consecutive micro-batches. Captions: see `choose_caption`; a dropped one is "". An unreadable sample
    is replaced by another of its bucket, decided by (seed, draw), and counted in ``substituted``.

    After a change of the batch size a run goes on at the step ``ceil(start_samples / global_batch_size)``.

    Args:
        start_samples: samples consumed so far. multiple_px: codec stride x patch size (images only).

    Raises:
        ConfigError: batch sizes that do not divide, a rank outside the world, a resolution that does not fit.
    """
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * world):
        raise ConfigError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} x {world} data-parallel ranks"
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is outside 0..{world - 1}")
    planner = Planner(corpus.buckets, seed, global_batch_size)
    for bucket, count in corpus.buckets.items():
        if count < global_batch_size:
            log.warning(
                "bucket %s has %d images, fewer than a global batch of %d: images repeat within a batch",
                *(bucket, count, global_batch_size),
            )
    sizes = {}
    if corpus.encoded is None:
        sizes = {b: buckets.size(b, config.resolution_px, multiple_px) for b in corpus.buckets}
    maker = _BatchMaker(corpus, config, seed, sizes)
    jobs = _jobs(planner, corpus, micro_batch_size, rank, world, start_samples)
    return Loader(jobs, maker, config, planner)


def _jobs(
    planner: Planner, corpus: Corpus, micro_batch_size: int, rank: int, world: int, start_samples: int
) -> Iterator[Job]:
    batch = planner.global_batch_size
    share = batch // world
    first_step = -(-start_samples // batch)
    passes: dict[str, int] = {}
    for step in itertools.count(first_step):
        plan = planner.plan(step)
        base = start_samples + (step - first_step) * batch
        if plan.epoch + 1 >= 2 * passes.get(
            plan.bucket, 1
        ):  # pass 2, 4, 8, ...: a small set must not fill the log
            passes[plan.bucket] = plan.epoch + 1
            log.info("step %d: bucket %s is in pass %d over its images", step, plan.bucket, plan.epoch + 1)
        start = corpus.start[plan.bucket]
        for low in range(rank * share, (rank + 1) * share, micro_batch_size):
            rows = (plan.rows[low : low + micro_batch_size] + start).tolist()
            draws = range(base + low, base + low + micro_batch_size)
            yield Job(step, plan.bucket, tuple(rows), tuple(draws))


class _BatchMaker(Dataset):
    """Makes a micro-batch from a `Job`: ``maker[job]`` -> (RawBatch, descriptions of replaced samples).

    A DataError is returned, not raised: DataLoader would wrap it in a worker's traceback.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, seed: int, sizes: dict[str, tuple[int, int]]):
        self.corpus, self.config, self.seed, self.sizes = corpus, config, seed, sizes
        self.empty_text = corpus.empty_text() if corpus.encoded is not None else None

    def __getitem__(self, job: Job) -> Made:
        problems: list[str] = []
        try:
            with images.quiet_decoding():
                items = [self._sample(job, i, problems) for i in range(len(job.rows))]
        except DataError as error:
            return error
        ids, texts, tensors, features = zip(*items, strict=True)
        stacked = torch.stack(tensors)
        if self.corpus.encoded is not None:
            batch = RawBatch(job.bucket, job.draws, ids, texts, latents_BCHW=stacked, text=_pad(features))
        else:
            batch = RawBatch(job.bucket, job.draws, ids, texts, pixels_BCHW=stacked)
        return batch, problems

    def _sample(self, job: Job, position: int, problems: list[str]) -> tuple:
        """(id, caption, pixels or latents [C, H, W], text features [L, U] or None)."""
        row, draw = job.rows[position], job.draws[position]
        for attempt in range(1, _SUBSTITUTE_ATTEMPTS + 1):
            try:
                sample = self.corpus.read(row)
                return self._load(sample, job.bucket, draw)
            except (DataError, images.UnusableImage) as error:
                problems.append(f"{self.corpus.id(row)} ({' '.join(str(error).split())})")
            count = self.corpus.buckets[job.bucket]
            offset = rng.key64(self.seed, draw, f"substitute:{attempt}") % count
            row = self.corpus.start[job.bucket] + offset
        raise DataError(
            f"{self.corpus.root}: {_SUBSTITUTE_ATTEMPTS} samples of bucket {job.bucket} in a row are "
            f"unreadable, the last one {problems[-1]}; copy the data set again"
        )

    def _load(self, sample: StoredSample, bucket: str, draw: int) -> tuple:
        choice = choose_caption(sample.captions, self.config, self.seed, draw)
        text = "" if choice is None else sample.captions[choice].text
        if self.corpus.encoded is None:
            pixels = images.load_pixels(sample.payload, *self.sizes[bucket])
            return sample.id, text, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), None
        latents, features = unpack_features(sample.payload, choice)
        return sample.id, text, latents, self.empty_text if features is None else features


def choose_caption(captions: tuple[Caption, ...], config: DataConfig, seed: int, draw: int) -> int | None:
    """Index of the caption for one draw, or None where it is dropped.

    The weights are renormalised over the length classes that the image has. If all of those have weight 0,
    every caption is equally likely.
    """
    if not captions or rng.uniform(seed, draw, "caption_drop") < config.caption_drop_frac:
        return None
    weights = config.caption_weights()
    groups = {name: [i for i, c in enumerate(captions) if c.length_class == name] for name in LENGTH_CLASSES}
    present = [(weights[name], members) for name, members in groups.items() if members and weights[name] > 0]
    members = list(range(len(captions)))
    if present:
        target = rng.uniform(seed, draw, "caption_class") * sum(w for w, _ in present)
        for weight, members in present:  # noqa: B007  (the one reached is used)
            target -= weight
            if target < 0:
                break
    return members[rng.key64(seed, draw, "caption") % len(members)]


def _pad(features: tuple[torch.Tensor, ...]) -> TextFeatures:
    """Stack [L_i, U] features, zeros behind the shorter ones; the mask is None when none is shorter."""
    lengths = torch.tensor([len(f) for f in features])
    padded = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    if bool((lengths == padded.shape[1]).all()):
        return TextFeatures(padded, None)
    return TextFeatures(padded, torch.arange(padded.shape[1])[None, :] < lengths[:, None])


class _JobSampler:
    """Hands the endless job sequence to the DataLoader, which spreads it over workers and keeps the order."""

    def __init__(self, jobs: Iterator[Job]):
        self._jobs = jobs

    def __iter__(self) -> Iterator[Job]:
        return self._jobs


class _Jobs(IterableDataset):
    """The same without workers."""

    def __init__(self, jobs: Iterator[Job], maker: _BatchMaker):
        self._jobs, self._maker = jobs, maker

    def __iter__(self) -> Iterator[Made]:
        return (self._maker[job] for job in self._jobs)


class _Batches:
    """A DataLoader iterator that is stopped for certain, once: by close, by dropping the loader, or at exit.

    Dropping the iterator alone is not enough: the traceback of an error keeps it alive. At exit, workers must be
    gone before multiprocessing's own exit handler waits for them; handlers registered later run earlier.
    """

    def __init__(self, iterator: Iterator[Made]):
        self.iterator = iterator
        atexit.register(self.stop)

    def stop(self) -> None:
        iterator, self.iterator = self.iterator, iter(())
        atexit.unregister(self.stop)
        shutdown = getattr(iterator, "_shutdown_workers", None)  # absent when there are no workers
        if shutdown is not None:
            shutdown()


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Keep SIGINT and SIGTERM pending, here and in the workers started meanwhile, until `start_worker` is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int, parent: int) -> None:
    """The main process decides when to stop: a signal to the group must not kill its loader first.

    Args:
        parent: process id of the program that owns the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    _end_with_parent(parent)


def _end_with_parent(parent: int) -> None:
    """Linux: the kernel kills this worker when the process that started it is gone, however that ended.

    Elsewhere DataLoader's own watch remains, which looks only between two batches, and which misses a parent that
    was gone before the worker came up.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the worker came this far
        os._exit(1)


def _identity(value: object) -> object:
    return value
