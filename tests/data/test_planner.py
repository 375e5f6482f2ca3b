"""The plan: each stream a bijection per pass, quotas that add up, and the same from any starting point."""

from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import pytest

from megatron_nucleus.data.curriculum import CurriculumConfig, Phases
from megatron_nucleus.data.mixture import Mixture
from megatron_nucleus.data.planner import Planner
from megatron_nucleus.utils.errors import ConfigError, DataError

COUNTS = {"1024x1024": 1000, "1344x768": 137, "768x1344": 30, "832x1248": 1}
CELLS = {
    "1024x1024": {("A1", "B1"): range(0, 40), ("A1", "B2"): range(40, 47), ("A3", "B1"): range(47, 100)},
    "768x1344": {(None, None): range(0, 5), ("A1", "B2"): range(5, 26), ("A3", "B1"): range(26, 30)},
}
CELL_COUNTS = {"1024x1024": 100, "768x1344": 30}
BATCHES = {"1024x1024": 24, "768x1344": 20}
PHASES = [
    {"at_samples": 0, "table": {"A1": {"B1": 5, "B2": 1}, "A3": {"B1": 1}}},
    {"at_samples": 4000, "table": {"A1": {"B2": 1}, "A3": {"B1": 1}}},
]


def planner(counts=COUNTS, seed=3, batch=16):
    return Planner(counts, seed, dict.fromkeys(counts, batch))


def mixed(seed=3, phases=PHASES, batches=BATCHES):
    curriculum = CurriculumConfig(Phases.from_plain(phases, "phases"))
    return Planner(CELL_COUNTS, seed, batches, Mixture(curriculum, CELLS, "test"))


def test_the_draws_of_one_stream_are_those_of_the_first_version():
    """A digest taken before there were streams: a run without a curriculum goes on as it began."""
    digest = hashlib.sha256()
    for step in [*range(300), 10**6, 10**12]:
        plan = planner().plan(step)
        digest.update(f"{plan.bucket}{plan.rows.tolist()}".encode())
    assert digest.hexdigest()[:16] == "4e5aca1261f38bfd"


def test_every_image_comes_once_per_epoch_of_its_bucket():
    drawn = {b: [] for b in COUNTS}
    for step in range(400):
        plan = planner().plan(step)
        drawn[plan.bucket] += plan.rows.tolist()
    for bucket, count in COUNTS.items():
        assert len(drawn[bucket]) >= count
        epochs = [drawn[bucket][i : i + count] for i in range(0, len(drawn[bucket]), count)]
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(count))
        assert len(set(epochs[-1])) == len(epochs[-1])
        if len(epochs) > 2 and count > 20:
            assert epochs[0] != epochs[1]


def test_every_cell_is_gone_through_pass_by_pass():
    drawn, reported = {}, Counter()
    plan_of = mixed()
    for step in range(600):
        plan = plan_of.plan(step)
        for share in plan.streams:
            rows = dict_of_cells(plan.bucket)[share.cell]
            drawn.setdefault(share.name, []).extend([r for r in plan.rows.tolist() if r in rows])
            assert len(drawn[share.name]) - reported[share.name] == share.samples
            reported[share.name] += share.samples
            assert share.epoch == (reported[share.name] - 1) // len(rows)
    for name, rows_drawn in drawn.items():
        bucket, cell = name.split(":")
        rows = dict_of_cells(bucket)[cell]
        counts = Counter(rows_drawn)
        # Inside a step rows are shuffled over the slots, so passes are checked by counts.
        assert set(counts) == set(rows)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert {n.split(":")[1] for n in drawn} == {"A1/B1", "A1/B2", "A3/B1"}


def dict_of_cells(bucket):
    return {f"{t}/{e}": rows for (t, e), rows in CELLS[bucket].items() if t}


def test_a_step_holds_its_quotas_mixed_over_the_slots():
    large = mixed(batches={"1024x1024": 240, "768x1344": 240})
    plan = next(plan for plan in map(large.plan, range(9)) if plan.bucket == "1024x1024")
    assert sum(share.samples for share in plan.streams) == len(plan.rows) == 240
    rows = dict_of_cells(plan.bucket)["A1/B1"]
    halves = [sum(r in rows for r in half.tolist()) for half in (plan.rows[:120], plan.rows[120:])]
    assert min(halves) > 0.4 * sum(halves)  # a rank's slice is no slice of the cells


@pytest.mark.parametrize("start", [0, 1, 17, 10**6, 10**12])
def test_a_plan_needs_no_history(start):
    fresh, used = planner(seed=5, batch=8), planner(seed=5, batch=8)
    for step in range(5):
        used.plan(step)
    for step in range(start, start + 20):
        a, b = fresh.plan(step), used.plan(step)
        assert a.bucket == b.bucket
        assert (a.rows == b.rows).all()


@pytest.mark.parametrize("start", [1, 100, 4090, 9000])  # 4096 steps are summed in one block
def test_a_plan_with_a_curriculum_needs_no_history(start):
    walked, order = mixed(), [*range(start, start + 12)]
    for step in range(0, start, 40):
        walked.plan(step)
    whole = {step: walked.plan(step) for step in order}
    fresh = mixed()
    for step in reversed(order):
        a, b = whole[step], fresh.plan(step)
        assert (a.bucket, a.samples_before, a.streams) == (b.bucket, b.samples_before, b.streams)
        assert (a.rows == b.rows).all()


def test_samples_before_is_the_sum_of_the_batches():
    plan_of, total = mixed(), 0
    for step in range(300):
        plan = plan_of.plan(step)
        assert plan.samples_before == plan_of.samples_before(step) == total
        assert plan_of.step_at(total) == step
        assert len(plan.rows) == BATCHES[plan.bucket]
        total += len(plan.rows)


def test_seeds_differ_and_repeat():
    for make in (lambda seed: planner(seed=seed, batch=32), mixed):
        plans = [make(seed).plan(9).rows.tolist() for seed in (1, 1, 2)]
        assert plans[0] == plans[1] != plans[2]


def test_a_bucket_smaller_than_the_batch_wraps_and_says_so():
    small = planner({"1024x1024": 5}, 0, 12)
    first, second = small.plan(0), small.plan(1)
    assert sorted(first.rows[:5]) == sorted(first.rows[5:10]) == list(range(5))
    assert first.streams[0].wrapped
    assert (first.streams[0].epoch, second.streams[0].epoch) == (2, 4)
    assert Counter(np.concatenate([first.rows, second.rows])[:20].tolist()) == dict.fromkeys(range(5), 4)


def test_the_step_that_begins_a_new_pass_is_marked():
    wrapped = [planner({"1024x1024": 40}, 0, 16).plan(s).streams[0].wrapped for s in range(7)]
    assert wrapped == [False, False, True, False, False, True, False]
    exact = planner({"1024x1024": 32}, 0, 16)
    assert [exact.plan(s).streams[0].wrapped for s in range(5)] == [False, False, True, False, True]


def test_bad_input():
    with pytest.raises(DataError, match="nothing to train on"):
        planner({})
    with pytest.raises(ConfigError, match="at least 1"):
        planner({"1024x1024": 3}, 0, 0)
    for plan_of in (planner(), mixed()):
        with pytest.raises(ConfigError, match="from 0"):
            plan_of.plan(-1)


def test_two_million_images_cost_little_per_step():
    large = planner({"1024x1024": 1_500_000, "1344x768": 500_000}, 0, 2048)
    start = time.process_time()
    for step in range(10**6, 10**6 + 50):
        large.plan(step)
    assert (time.process_time() - start) / 50 < 0.02  # about 0.4 ms on one core
