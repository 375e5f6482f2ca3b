"""How many images of a step come from each cell of its aspect bucket, and how many did in all steps before.

*Systematic rounding.* The n images of a step lie on a line of length n, on which every cell of the bucket owns a
stretch as long as its quota n * share. Marks stand at u, u + 1, ..., u + n - 1 with u in [0, 1); each draws one image
from the cell it stands in. So every cell gets its quota rounded down or up, and the sum is n. The mark u moves by
the golden ratio from one visit of the bucket to the next, which spreads it evenly over [0, 1): a cell gets its
quotas in the long run, also one whose share is below one image per step. (Largest remainders, the same each step,
would never draw such a cell.) With a constant table no cell was more than 3 images off after 300,000 visits; while
a table moves, its drift can beat against the golden ratio: at most 270 images off over ramps of 300 to 300,000
visits of 64 or 256 images. u is exact (modulo 2^64), the line is measured in 2^-32 of an image.

*Positions.* The next image of a cell is the one after all that earlier visits drew, the sum of their quotas. The
sums over blocks of steps are kept, those inside a block computed in one go, so any step is found without replay
from its predecessor; the first look at step k costs one pass over the k steps before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_nucleus.data.mixture import Mixture
from megatron_nucleus.data.timetable import Timetable
from megatron_nucleus.utils.rng import key64

BLOCK_STEPS = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_UNIT = 1 << 32  # units of length per image


class StepQuota(NamedTuple):
    """One step. index: its bucket's number. samples_before: images of all earlier steps.

    earlier_C, quota_C: int64 per cell of the bucket, images drawn by earlier steps and by this one.
    """

    index: int
    samples_before: int
    earlier_C: np.ndarray
    quota_C: np.ndarray


class _Block(NamedTuple):
    """Steps [number * BLOCK_STEPS, ...). place_V: how many earlier steps of the block had the same bucket.

    quotas: per bucket [cells, visits in the block].
    """

    number: int
    sequence_V: np.ndarray
    place_V: np.ndarray
    samples_V: np.ndarray
    quotas: list[np.ndarray]


class QuotaBook:
    """The quotas of every step of a curriculum run."""

    def __init__(self, timetable: Timetable, mixture: Mixture, seed: int):
        self._timetable, self._mixture = timetable, mixture
        self._keys = [key64(seed, 0, f"quota_phase:{b}") for b in timetable.buckets]
        self._starts = [[np.zeros(len(mixture.cells[b]), np.int64) for b in timetable.buckets]]
        self._block: _Block | None = None

    def at(self, step: int) -> StepQuota:
        """Quotas of a step, and the sums of those before."""
        block = self._open(step // BLOCK_STEPS)
        inside = step % BLOCK_STEPS
        index, place = int(block.sequence_V[inside]), int(block.place_V[inside])
        quotas_CV = block.quotas[index]
        earlier_C = self._starts[block.number][index] + quotas_CV[:, :place].sum(axis=1)
        return StepQuota(index, int(block.samples_V[inside]), earlier_C, quotas_CV[:, place])

    def _open(self, number: int) -> _Block:
        """Block ``number``, and the sums up to its start."""
        if self._block is None or self._block.number != number:
            for missing in range(len(self._starts) - 1, number):
                quotas = self._compute(missing).quotas
                totals = zip(self._starts[missing], quotas, strict=True)
                self._starts.append([start + block_CV.sum(axis=1) for start, block_CV in totals])
            self._block = self._compute(number)
        return self._block

    def _compute(self, number: int) -> _Block:
        table, first = self._timetable, number * BLOCK_STEPS
        sequence_V = table.sequence(first, first + BLOCK_STEPS)
        before = table.visit(first).before
        batch_V = np.array(table.batch_samples, np.int64)[sequence_V]
        samples_V = table.samples_of(before) + np.cumsum(batch_V) - batch_V
        place_V, quotas = np.zeros_like(sequence_V), []
        for index, bucket in enumerate(table.buckets):
            chosen = np.flatnonzero(sequence_V == index)
            place_V[chosen] = np.arange(len(chosen))
            shares_CV = self._mixture.bucket_shares(bucket, samples_V[chosen])
            mark_V = golden_marks(self._keys[index], before[index], len(chosen))
            quotas.append(systematic(shares_CV, table.batch_samples[index], mark_V))
        return _Block(number, sequence_V, place_V, samples_V, quotas)


def golden_marks(key: int, first: int, count: int) -> np.ndarray:
    """The marks u of visits ``first .. first + count - 1``, int64 in [0, 2^32) standing for [0, 1)."""
    visits = np.arange(first, first + count, dtype=np.uint64)
    return ((np.uint64(key << 1) + visits * _GOLDEN) >> np.uint64(32)).astype(np.int64)


def systematic(shares_CV: np.ndarray, samples: int, mark_V: np.ndarray) -> np.ndarray:
    """Quotas int64 [cells, V] that add up to ``samples`` in every column, each its share's floor or ceiling.

    Args:
        shares_CV: columns of sum 1. samples: below 2^31. mark_V: `golden_marks`.
    """
    line = samples * _UNIT
    ends_CV = np.minimum(np.rint(np.cumsum(shares_CV, axis=0) * float(line)).astype(np.int64), line)
    more_CV = np.logical_or.accumulate((shares_CV > 0)[::-1], axis=0)[
        ::-1
    ]  # this cell or a later one has a share
    ends_CV[:-1][~more_CV[1:]] = line  # rounding must not leave a stretch to a cell of share 0
    ends_CV[-1] = line
    marks_below_CV = (ends_CV - mark_V + (_UNIT - 1)) >> 32  # of the marks u + i, those below each end
    return np.diff(marks_below_CV, axis=0, prepend=0)
