"""Which aspect bucket each step draws from, and how many images have been drawn before it.

Bucket b with c_b images, drawn n_b at a time, needs c_b / n_b steps for one pass, and so gets that share p_b of
the steps: every image is equally likely. Its visits are evenly spaced points ``(j + offset_b) / p_b`` on a common
time axis, and step k is the k-th point of all buckets in time order (a low-discrepancy sequence). After k steps
a bucket has been visited p_b * k times, give or take ``1 + p_b * (number of buckets)``.

All of it is exact integer arithmetic, for any step directly: nothing is replayed and nothing is stored.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.rng import key64

_STEP_UNITS = 1 << 20  # time units per step: resolution of a bucket's offset


class Visit(NamedTuple):
    """One step: its bucket (by number), and how many earlier steps drew from each bucket."""

    index: int
    before: list[int]


class Timetable:
    """The bucket of every step.

    Attributes:
        buckets: names, sorted. counts: images of each. batch_samples: images that a step draws from each.
    """

    def __init__(self, bucket_counts: Mapping[str, int], batch_samples: Mapping[str, int], seed: int):
        """bucket_counts: images per aspect bucket. batch_samples: images per step of that bucket.

        Raises:
            DataError: no images, or a bucket without one. ConfigError: a batch size below 1.
        """
        if not bucket_counts or min(bucket_counts.values()) < 1:
            raise DataError(f"nothing to train on: images per bucket are {dict(bucket_counts)}")
        self.buckets = sorted(bucket_counts)
        self.counts = [int(bucket_counts[b]) for b in self.buckets]
        self.batch_samples = [int(batch_samples[b]) for b in self.buckets]
        for bucket, samples in zip(self.buckets, self.batch_samples, strict=True):
            if samples < 1:
                raise ConfigError(f"--global-batch-size {samples} (bucket {bucket}): at least 1")
        common = math.lcm(*self.batch_samples)
        rates = [c * (common // n) for c, n in zip(self.counts, self.batch_samples, strict=True)]
        self._rates = [rate // math.gcd(*rates) for rate in rates]  # p_b = rate / total
        self._total = sum(self._rates)
        self._offsets = [
            key64(seed, 0, f"bucket_offset:{b}") % _STEP_UNITS for b in self.buckets
        ]  # in time units, [0, 1) step of the bucket's own spacing

    def visit(self, step: int) -> Visit:
        """The bucket of a step (0 is the first); visits at the same time go in bucket order."""
        if step < 0:
            raise ConfigError(f"step {step}: steps count from 0")
        time = self._time_of(step)
        before = self._visited_by(time - 1)
        rest = step - sum(before)
        for i in range(len(self.buckets)):
            if self._visits_until(i, time) > before[i]:
                if rest == 0:
                    return Visit(i, before)
                before[i] += 1
                rest -= 1
        raise AssertionError(f"no bucket at step {step}")  # unreachable: time was chosen so that one is

    def samples_before(self, step: int) -> int:
        """Images drawn by all steps before ``step``."""
        return self.samples_of(self.visit(step).before)

    def samples_of(self, visits: list[int]) -> int:
        """Images drawn by so many visits of each bucket."""
        return sum(v * n for v, n in zip(visits, self.batch_samples, strict=True))

    def step_at(self, samples: int) -> int:
        """The smallest step with ``samples_before(step) >= samples``: the inverse of `samples_before`.

        Raises:
            ConfigError: a negative number of samples.
        """
        if samples < 0:
            raise ConfigError(f"samples seen {samples}: 0 or more")
        steps = range(-(-samples // min(self.batch_samples)) + 1)
        return bisect.bisect_left(steps, samples, key=self.samples_before)

    def sequence(self, first: int, last: int) -> np.ndarray:
        """Bucket number of the steps ``first .. last - 1``, int64."""
        low, high = self.visit(first).before, self.visit(last).before
        times, numbers = [], []
        for i, rate in enumerate(self._rates):
            scale, shift = _STEP_UNITS * self._total, self._offsets[i] * self._total
            times += [(j * scale + shift) // rate for j in range(low[i], high[i])]
            numbers += [i] * (high[i] - low[i])
        order = np.argsort(np.array(times, np.int64), kind="stable")  # stable: ties in bucket order
        return np.array(numbers, np.int64)[order]

    def _visited_by(self, time: int) -> list[int]:
        return [self._visits_until(i, time) for i in range(len(self.buckets))]

    def _visits_until(self, index: int, time: int) -> int:
        """Visits j of a bucket with floor((j * U + offset) * total / rate) <= time, U units per step."""
        numerator = (time + 1) * self._rates[index] - self._offsets[index] * self._total
        return max(0, -(-numerator // (_STEP_UNITS * self._total)))

    def _time_of(self, step: int) -> int:
        """Smallest time by which more than ``step`` visits have happened."""
        low = max(-1, (step - len(self.buckets) - 1) * _STEP_UNITS)
        high = (step + len(self.buckets) + 1) * _STEP_UNITS
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._visited_by(middle)) > step:
                high = middle
            else:
                low = middle
        return high
