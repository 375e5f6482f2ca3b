"""Which images a training step draws: a pure function of (seed, step), the same for every rank and world.

Two layers, both computed for any step directly, without replay and without any array as long as an epoch:

- The *bucket* of a step. Bucket b holds a share p_b of the images and so gets the same share of the steps:
  its visits are evenly spaced points ``(j + offset_b) / p_b`` on a common time axis, and step k is the k-th
  point of all buckets in time order (a low-discrepancy sequence; exact integer arithmetic). After k steps a
  bucket has been visited p_b * k times, give or take ``1 + p_b * (number of buckets)``.
- The *images* of a visit. Bucket b's n_b images come in the order of a keyed permutation of [0, n_b), a new
  permutation for every epoch of the bucket. The permutation is a 4-round Feistel network on the next power of
  two, walked until it lands inside (cycle walking), so it is a bijection: each image comes exactly once per
  epoch. A bucket smaller than a batch simply wraps into its next epochs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.rng import key64

PLAN_VERSION = 1
ROUNDS = 4
_STEP_UNITS = 1 << 20  # time units per step: resolution of a bucket's offset
log = logging.getLogger(__name__)


class StepPlan(NamedTuple):
    """What one optimizer step draws.

    rows: int64 [global batch], positions inside the bucket, [0, images of the bucket).
    epoch: passes through the bucket completed before the last row. wrapped: a new pass begins in this step.
    """

    step: int
    bucket: str
    rows: np.ndarray
    epoch: int
    wrapped: bool


class Planner:
    """``plan(step)`` for a data set, a seed and a global batch size."""

    def __init__(self, bucket_counts: Mapping[str, int], seed: int, global_batch_size: int):
        """bucket_counts: images per aspect bucket (every one at least 1).

        Raises:
            DataError: no images. ConfigError: a batch size below 1.
        """
        if not bucket_counts or min(bucket_counts.values()) < 1:
            raise DataError(f"nothing to train on: images per bucket are {dict(bucket_counts)}")
        if global_batch_size < 1:
            raise ConfigError(f"--global-batch-size {global_batch_size}: at least 1")
        self.buckets = sorted(bucket_counts)
        self.counts = [int(bucket_counts[b]) for b in self.buckets]
        self.total = sum(self.counts)
        self.seed, self.global_batch_size = seed, global_batch_size
        self._offsets = [
            key64(seed, 0, f"bucket_offset:{b}") % _STEP_UNITS for b in self.buckets
        ]  # in time units, [0, 1) step of the bucket's own spacing

    def bucket_of(self, step: int) -> tuple[str, int]:
        """The bucket of a step, and how many earlier steps drew from it."""
        index, visit = self._visit(step)
        return self.buckets[index], visit

    def plan(self, step: int) -> StepPlan:
        """Bucket and rows of a step (0 is the first)."""
        if step < 0:
            raise ConfigError(f"step {step}: steps count from 0")
        index, visit = self._visit(step)
        count, batch = self.counts[index], self.global_batch_size
        first = visit * batch
        ordinals = first + np.arange(batch, dtype=np.int64)
        epochs = ordinals // count
        rows = np.empty(batch, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
            key = key64(self.seed, epoch, f"permutation:{self.buckets[index]}")
            rows[chosen] = permute(ordinals[chosen] - epoch * count, count, key)
        last = int(epochs[-1])
        return StepPlan(step, self.buckets[index], rows, last, last > max(0, first - 1) // count)

    def epochs_at(self, step: int) -> dict[str, float]:
        """How often each bucket has been passed through before ``step`` (2.5: half-way in the third pass)."""
        visits = [self._visits_before(i, step) for i in range(len(self.buckets))]
        return {
            b: v * self.global_batch_size / n
            for b, v, n in zip(self.buckets, visits, self.counts, strict=True)
        }

    def _visits_before(self, index: int, step: int) -> int:
        time = self._time_of(step)
        before = [self._visits_until(i, time - 1) for i in range(len(self.buckets))]
        rest = step - sum(before)
        for i in range(len(self.buckets)):
            if rest and self._visits_until(i, time) > before[i]:
                before[i] += 1
                rest -= 1
        return before[index]

    def _visits_until(self, index: int, time: int) -> int:
        """Visits j of a bucket with floor((j * U + offset) * total / count) <= time, U units per step."""
        numerator = (time + 1) * self.counts[index] - self._offsets[index] * self.total
        return max(0, -(-numerator // (_STEP_UNITS * self.total)))

    def _time_of(self, step: int) -> int:
        """Smallest time by which more than ``step`` visits have happened."""
        low = max(-1, (step - len(self.buckets) - 1) * _STEP_UNITS)
        high = (step + len(self.buckets) + 1) * _STEP_UNITS
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._visits_until(i, middle) for i in range(len(self.buckets))) > step:
                high = middle
            else:
                low = middle
        return high

    def _visit(self, step: int) -> tuple[int, int]:
        """(bucket index, earlier visits) of a step; visits at the same time go in bucket order."""
        time = self._time_of(step)
        before = [self._visits_until(i, time - 1) for i in range(len(self.buckets))]
        rank = step - sum(before)
        for i, visits in enumerate(before):
            if self._visits_until(i, time) > visits:
                if rank == 0:
                    return i, visits
                rank -= 1
        raise AssertionError(f"no bucket at step {step}")  # unreachable: time was chosen so that one is


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Image of ``positions`` (int64, in [0, count)) under the keyed permutation of [0, count)."""
    if count == 1:
        return np.zeros_like(positions)
    bits = max(2, (count - 1).bit_length())
    keys = [np.uint64(key64(key, i, "feistel")) for i in range(ROUNDS)]
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= count)
    while len(outside):
        out[outside] = _feistel(out[outside], bits, keys)
        outside = outside[out[outside] >= count]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Unbalanced Feistel network on ``bits`` bits: the halves are masked by each other in turn."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
