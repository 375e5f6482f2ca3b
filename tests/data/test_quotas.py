"""Quotas: within one image of the table at every step, exact in the long run, also for the smallest share."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_nucleus.data.curriculum import CurriculumConfig, Phases
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.data.mixture import Mixture
from megatron_nucleus.data.quotas import QuotaBook, golden_marks, systematic
from megatron_nucleus.data.timetable import Timetable

ALL_CELLS = {
    cell: range(10 * i, 10 * i + 10) for i, cell in enumerate(itertools.product(TIERS, EPISODE_BUCKETS))
}
COUNTS = {"1024x1024": 900, "768x1344": 400}
BATCHES = {"1024x1024": 64, "768x1344": 48}
RAMP = [
    {
        "at_samples": 0,
        "tiers": {"A1": 4, "A2": 3, "A3": 2, "A4": 1, "A5": 1},
        "episodes": dict(zip(EPISODE_BUCKETS, range(8, 0, -1), strict=True)),
    },
    {"at_samples": 200_000, "table": {"A1": {"B1": 1, "B2": 1}, "A4": {"B8": 300}}},
]


def make(phases=RAMP, seed=5, floor=0.02):
    curriculum = CurriculumConfig(Phases.from_plain(phases, "phases"), floor)
    mixture = Mixture(curriculum, dict.fromkeys(COUNTS, ALL_CELLS), "test")
    table = Timetable(COUNTS, BATCHES, seed)
    return table, mixture, QuotaBook(table, mixture, seed)


def test_systematic_rounding_counts_marks_on_a_line():
    """Against a drawing of the line in exact fractions, shares that are exact in binary."""
    rng = np.random.default_rng(0)
    for samples in (1, 3, 8, 37):
        parts = rng.multinomial(256, [0.02, 0.4, 0.0, 0.08, 0.5, 0.0])
        shares = parts / 256.0
        marks = golden_marks(99, 0, 50)
        got = systematic(np.tile(shares[:, None], 50), samples, marks)
        for visit, mark in enumerate(marks.tolist()):
            points = [Fraction(mark, 1 << 32) + i for i in range(samples)]
            ends = [Fraction(int(x), 256) * samples for x in np.cumsum(parts)]
            starts = [Fraction(0), *ends[:-1]]
            want = [sum(a <= p < b for p in points) for a, b in zip(starts, ends, strict=True)]
            assert got[:, visit].tolist() == want


def test_marks_step_by_the_golden_ratio_and_start_anywhere():
    marks = golden_marks(123456789, 0, 3000)
    assert (golden_marks(123456789, 1234, 100) == marks[1234:1334]).all()
    steps = np.diff(marks) % (1 << 32) / 2**32
    assert np.abs(steps - (math.sqrt(5) - 1) / 2).max() < 1e-8
    counts = np.histogram(marks / 2**32, 64, (0, 1))[0]
    assert counts.min() >= 45  # 46.9 each: low discrepancy, far more even than chance
    assert counts.max() <= 49


@pytest.mark.parametrize("samples", [1, 7, 40, 256, 100_000])
def test_every_quota_is_within_one_of_its_share_and_a_zero_share_draws_nothing(samples):
    rng = np.random.default_rng(samples)
    shares = rng.random((40, 2000)) ** 8 * (rng.random((40, 1)) < 0.7)
    shares /= shares.sum(axis=0)
    quotas = systematic(shares, samples, golden_marks(3, 0, 2000))
    assert (quotas.sum(axis=0) == samples).all()
    assert np.abs(quotas - shares * samples).max() < 1 + 1e-6
    assert quotas.min() == 0
    assert not quotas[shares == 0].any()


def test_rounding_gives_nothing_to_a_cell_of_share_zero_at_the_end_of_the_line():
    shares = np.array([0.1] * 10 + [0.0])
    assert np.cumsum(shares)[-1] < 1  # in binary
    quotas = systematic(shares[:, None], 1 << 30, np.array([(1 << 32) - 1]))[:, 0]
    assert quotas.sum() == 1 << 30
    assert quotas[-1] == 0


def test_the_long_run_is_exact_also_for_a_share_below_one_image():
    shares = np.array([0.001, 0.6, 0.0004, 0.2986, 0.1])
    visits = 50_000
    quotas = systematic(np.tile(shares[:, None], visits), 16, golden_marks(17, 0, visits))
    drawn = np.cumsum(quotas, axis=1)
    wanted = 16 * shares[:, None] * np.arange(1, visits + 1)
    assert np.abs(drawn - wanted).max() < 6  # of 800,000; at random it would be hundreds
    assert drawn[2, -1] == pytest.approx(320, abs=6)  # 0.0064 of an image per step


def test_every_step_keeps_to_the_table_and_knows_what_was_before():
    table, mixture, book = make()
    sums = {b: np.zeros(40, np.int64) for b in COUNTS}
    wanted = {b: np.zeros(40) for b in COUNTS}
    for step in range(6000):
        quota = book.at(step)
        bucket = table.buckets[quota.index]
        assert (quota.earlier_C == sums[bucket]).all()
        assert quota.samples_before == table.samples_before(step)
        shares = mixture.bucket_shares(bucket, np.array([quota.samples_before]))[:, 0]
        assert quota.quota_C.sum() == BATCHES[bucket]
        assert np.abs(quota.quota_C - BATCHES[bucket] * shares).max() < 1 + 1e-6
        sums[bucket] += quota.quota_C
        wanted[bucket] += BATCHES[bucket] * shares
    for bucket in COUNTS:
        assert (
            np.abs(sums[bucket] - wanted[bucket]).max() < 20
        )  # of 130,000, while the table moves all the time


def test_a_late_step_is_found_directly_and_in_seconds():
    """A million steps over 7 buckets of 40 cells take 1.4 s on one core; here a quarter of them."""
    _, _, book = make(floor=0.01)
    start = time.process_time()
    late = book.at(250_000)
    assert time.process_time() - start < 10
    again = make(floor=0.01)[2]
    again.at(100_000)
    assert (again.at(250_000).earlier_C == late.earlier_C).all()


def test_seeds_differ():
    quotas = [np.stack([make(seed=s)[2].at(k).quota_C for k in (2, 3)]).tolist() for s in (1, 1, 2)]
    assert quotas[0] == quotas[1] != quotas[2]
