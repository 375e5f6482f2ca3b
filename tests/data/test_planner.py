"""The plan: a bijection per epoch, exact quotas, one bucket per step, and the same from any starting point."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from megatron_nucleus.data.planner import Planner, permute
from megatron_nucleus.utils.errors import ConfigError, DataError

COUNTS = {"1024x1024": 1000, "1344x768": 137, "768x1344": 30, "832x1248": 1}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 1000, 1024, 4097])
def test_permutation_is_a_bijection(count):
    for key in range(5):
        assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


def test_permutation_works_position_by_position():
    whole = permute(np.arange(1000), 1000, 42)
    some = np.array([0, 999, 500, 7])
    assert (permute(some, 1000, 42) == whole[some]).all()


def test_permutations_look_random():
    count, keys = 64, 400
    table = np.stack([permute(np.arange(count), count, key) for key in range(keys)])
    # Every position should take every value about keys / count = 6.25 times (chi-square over 64 x 64 cells).
    cells = np.zeros((count, count))
    for position in range(count):
        cells[position] = np.bincount(table[:, position], minlength=count)
    chi_square = ((cells - keys / count) ** 2 / (keys / count)).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5
    large = permute(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


def test_every_image_comes_once_per_epoch_of_its_bucket():
    planner = Planner(COUNTS, seed=3, global_batch_size=16)
    drawn = {b: [] for b in COUNTS}
    for step in range(400):
        plan = planner.plan(step)
        drawn[plan.bucket] += plan.rows.tolist()
    for bucket, count in COUNTS.items():
        assert len(drawn[bucket]) >= count
        epochs = [drawn[bucket][i : i + count] for i in range(0, len(drawn[bucket]), count)]
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(count))
        assert len(set(epochs[-1])) == len(epochs[-1])
        if len(epochs) > 2 and count > 20:
            assert epochs[0] != epochs[1]


def test_buckets_get_their_share_of_steps_everywhere():
    planner = Planner(COUNTS, seed=0, global_batch_size=64)
    total, seen = sum(COUNTS.values()), Counter()
    for step in range(6000):
        bucket, visit = planner.bucket_of(step)
        assert visit == seen[bucket]  # earlier visits, without replay
        seen[bucket] += 1
        if step % 97 == 0:
            for b, n in COUNTS.items():
                share = n / total
                assert abs(seen[b] - (step + 1) * share) <= 1 + share * len(COUNTS)
    assert seen["832x1248"] > 0  # a bucket of one image is never dropped


@pytest.mark.parametrize("start", [0, 1, 17, 10**6, 10**12])
def test_a_plan_needs_no_history(start):
    fresh = Planner(COUNTS, seed=5, global_batch_size=8)
    used = Planner(COUNTS, seed=5, global_batch_size=8)
    for step in range(5):
        used.plan(step)
    for step in range(start, start + 20):
        a, b = fresh.plan(step), used.plan(step)
        assert a.bucket == b.bucket
        assert (a.rows == b.rows).all()


def test_seeds_differ_and_repeat():
    plans = [Planner(COUNTS, seed, 32).plan(9).rows.tolist() for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_bucket_smaller_than_the_batch_wraps_and_says_so():
    planner = Planner({"1024x1024": 5}, seed=0, global_batch_size=12)
    first, second = planner.plan(0), planner.plan(1)
    assert sorted(first.rows[:5]) == sorted(first.rows[5:10]) == list(range(5))
    assert first.wrapped
    assert (first.epoch, second.epoch) == (2, 4)
    assert Counter(np.concatenate([first.rows, second.rows])[:20].tolist()) == dict.fromkeys(range(5), 4)
    assert planner.epochs_at(10) == {"1024x1024": 24.0}


def test_the_step_that_begins_a_new_pass_is_marked():
    planner = Planner({"1024x1024": 40}, seed=0, global_batch_size=16)
    assert [planner.plan(s).wrapped for s in range(7)] == [False, False, True, False, False, True, False][:7]
    exact = Planner({"1024x1024": 32}, seed=0, global_batch_size=16)
    assert [exact.plan(s).wrapped for s in range(5)] == [False, False, True, False, True]


def test_epochs_at_counts_what_was_drawn():
    planner = Planner(COUNTS, seed=1, global_batch_size=16)
    drawn = Counter()
    for step in range(200):
        drawn[planner.plan(step).bucket] += 16
    assert planner.epochs_at(200) == {b: drawn[b] / n for b, n in COUNTS.items()}


def test_bad_input():
    with pytest.raises(DataError, match="nothing to train on"):
        Planner({}, 0, 8)
    with pytest.raises(DataError, match="nothing to train on"):
        Planner({"1024x1024": 0}, 0, 8)
    with pytest.raises(ConfigError, match="at least 1"):
        Planner({"1024x1024": 3}, 0, 0)
    with pytest.raises(ConfigError, match="from 0"):
        Planner({"1024x1024": 3}, 0, 1).plan(-1)


def test_two_million_images_cost_little_per_step():
    planner = Planner({"1024x1024": 1_500_000, "1344x768": 500_000}, seed=0, global_batch_size=2048)
    start = time.process_time()
    for step in range(10**6, 10**6 + 50):
        planner.plan(step)
    assert (time.process_time() - start) / 50 < 0.02  # about 0.4 ms on one core
