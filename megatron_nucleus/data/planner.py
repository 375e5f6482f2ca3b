"""Which images a training step draws: a pure function of (seed, step), the same for every rank and world.

- The *bucket* of a step, and how many images it draws: `data/timetable.py`.
- The *streams* of a bucket. Without a curriculum there is one, the whole bucket. With one, every cell (tier x
  episode bucket) is a stream of its own, and `data/quotas.py` says how many images of the step come from each.
- The *images* of a stream come in the order of a keyed permutation of its rows, a new permutation for every pass:
  each image comes exactly once per pass. A stream smaller than its part of a batch wraps into its next passes.

All is computed for any step directly, and nothing is as long as a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_nucleus.data.mixture import Mixture, cell_name
from megatron_nucleus.data.permutation import permute
from megatron_nucleus.data.quotas import QuotaBook
from megatron_nucleus.data.timetable import Timetable
from megatron_nucleus.utils.rng import key64

# Raised when the same seed and step no longer draw the same samples. 2: captions are stratified over the step.
PLAN_VERSION = 2


class StreamShare(NamedTuple):
    """What a step draws from one stream.

    name: ``1024x1024``, or ``1024x1024:A1/B2`` with a curriculum. cell: ``A1/B2``, "" without a curriculum.
    epoch: passes through the stream completed before the last row. wrapped: a new pass begins in this step.
    """

    name: str
    cell: str
    samples: int
    epoch: int
    wrapped: bool


class StepPlan(NamedTuple):
    """What one optimizer step draws.

    samples_before: images of all earlier steps. rows: int64 [images of the step], positions inside the bucket.
    """

    step: int
    bucket: str
    samples_before: int
    rows: np.ndarray
    streams: tuple[StreamShare, ...]


class _Stream(NamedTuple):
    name: str
    cell: str
    first: int
    count: int


class Planner:
    """``plan(step)`` for a data set, a seed, batch sizes and, if there is one, a curriculum."""

    def __init__(
        self,
        bucket_counts: Mapping[str, int],
        seed: int,
        batch_samples: Mapping[str, int],
        mixture: Mixture | None = None,
    ):
        """bucket_counts: images per aspect bucket, each at least 1. batch_samples: images per step of a bucket.

        Raises:
            DataError: no images. ConfigError: a batch size below 1.
        """
        self._timetable = Timetable(bucket_counts, batch_samples, seed)
        self._seed = seed
        self._book = None if mixture is None else QuotaBook(self._timetable, mixture, seed)
        self._streams = [_streams(b, bucket_counts[b], mixture) for b in self._timetable.buckets]

    def samples_before(self, step: int) -> int:
        """Images that all steps before ``step`` draw."""
        return self._timetable.samples_before(step)

    def step_at(self, samples: int) -> int:
        """The smallest step with ``samples_before(step) >= samples``; ConfigError when negative."""
        return self._timetable.step_at(samples)

    def plan(self, step: int) -> StepPlan:
        """Bucket and rows of a step (0 is the first)."""
        if self._book is None or step < 0:
            index, before = self._timetable.visit(step)
            samples, batch = self._timetable.samples_of(before), self._timetable.batch_samples[index]
            quotas = [(before[index] * batch, batch)]
        else:
            index, samples, earlier_C, quota_C = self._book.at(step)
            quotas = list(zip(earlier_C.tolist(), quota_C.tolist(), strict=True))
        parts, shares = [], []
        for stream, (first, number) in zip(self._streams[index], quotas, strict=True):
            if number:
                rows, epoch, wrapped = self._draw(stream, first, number)
                parts.append(rows)
                shares.append(StreamShare(stream.name, stream.cell, number, epoch, wrapped))
        rows = np.concatenate(parts)
        if len(self._streams[index]) > 1:  # else a rank's slice would hold few cells
            slots = np.arange(len(rows), dtype=np.int64)
            rows = rows[permute(slots, len(rows), key64(self._seed, step, "slots"))]
        return StepPlan(step, self._timetable.buckets[index], samples, rows, tuple(shares))

    def _draw(self, stream: _Stream, first: int, number: int) -> tuple[np.ndarray, int, bool]:
        """Rows of the stream's images ``first .. first + number - 1``, the last one's pass, whether a pass begins."""
        ordinals = first + np.arange(number, dtype=np.int64)
        epochs = ordinals // stream.count
        rows = np.empty(number, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
            key = key64(self._seed, epoch, f"permutation:{stream.name}")
            rows[chosen] = permute(ordinals[chosen] - epoch * stream.count, stream.count, key)
        last = int(epochs[-1])
        return rows + stream.first, last, last > max(0, first - 1) // stream.count


def _streams(bucket: str, count: int, mixture: Mixture | None) -> list[_Stream]:
    if mixture is None:
        return [_Stream(bucket, "", 0, count)]
    return [
        _Stream(f"{bucket}:{cell_name(cell)}", cell_name(cell), rows.start, len(rows))
        for cell, rows in mixture.cells[bucket].items()
    ]
