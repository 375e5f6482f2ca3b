"""The timetable: even shares of the steps, exact counts of images, and the same from any starting point."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_nucleus.data.timetable import Timetable
from megatron_nucleus.utils.errors import ConfigError, DataError

COUNTS = {"1024x1024": 1000, "1344x768": 137, "768x1344": 30, "832x1248": 1}
EVEN = dict.fromkeys(COUNTS, 64)
UNEVEN = {"1024x1024": 64, "1344x768": 80, "768x1344": 48, "832x1248": 7}


@pytest.mark.parametrize("batches", [EVEN, UNEVEN])
def test_buckets_get_their_share_of_steps_everywhere(batches):
    table = Timetable(COUNTS, batches, seed=0)
    rates = {b: COUNTS[b] / batches[b] for b in COUNTS}
    total, seen = sum(rates.values()), Counter()
    for step in range(6000):
        index, before = table.visit(step)
        assert before == [seen[b] for b in table.buckets]  # earlier visits, without replay
        seen[table.buckets[index]] += 1
        if step % 97 == 0:
            for b, rate in rates.items():
                share = rate / total
                assert abs(seen[b] - (step + 1) * share) <= 1 + share * len(COUNTS)
    assert seen["832x1248"] > 0  # a bucket of one image is never dropped


def test_every_image_is_equally_likely_whatever_the_batch_sizes():
    table = Timetable(COUNTS, UNEVEN, seed=4)
    steps = 200_000
    visits = np.bincount(table.sequence(0, steps), minlength=len(COUNTS))
    passes = [v * n / c for v, n, c in zip(visits, table.batch_samples, table.counts, strict=True)]
    for visited, passed in zip(visits, passes, strict=True):
        assert abs(passed / np.mean(passes) - 1) < 3 / visited + 1e-3


@pytest.mark.parametrize("batches", [EVEN, UNEVEN])
@pytest.mark.parametrize("first", [0, 1, 777, 10**6, 10**9])
def test_a_sequence_in_one_go_is_that_of_single_steps(batches, first):
    table = Timetable(COUNTS, batches, seed=2)
    assert table.sequence(first, first + 150).tolist() == [table.visit(first + i).index for i in range(150)]


@pytest.mark.parametrize("batches", [EVEN, UNEVEN])
def test_samples_before_adds_up_and_step_at_is_its_inverse(batches):
    table = Timetable(COUNTS, batches, seed=1)
    total = 0
    for step in range(500):
        assert table.samples_before(step) == total
        assert table.step_at(total) == step
        if total:
            assert table.step_at(total - 1) == step
            assert table.step_at(total + 1) == step + 1
        total += table.batch_samples[table.visit(step).index]
    for step in (10**6, 10**12):  # far away, directly and exactly
        samples = table.samples_before(step)
        assert table.samples_before(step + 1) - samples == table.batch_samples[table.visit(step).index]
        assert (table.step_at(samples), table.step_at(samples + 1)) == (step, step + 1)
    if batches is EVEN:
        assert table.samples_before(12345) == 12345 * 64


def test_bad_input():
    for counts in ({}, {"1024x1024": 0}):
        with pytest.raises(DataError, match="nothing to train on"):
            Timetable(counts, {"1024x1024": 8}, 0)
    with pytest.raises(ConfigError, match=r"0 \(bucket 1024x1024\): at least 1"):
        Timetable({"1024x1024": 3}, {"1024x1024": 0}, 0)
    table = Timetable({"1024x1024": 3}, {"1024x1024": 1}, 0)
    with pytest.raises(ConfigError, match="from 0"):
        table.visit(-1)
    with pytest.raises(ConfigError, match="samples seen -5"):
        table.step_at(-5)
