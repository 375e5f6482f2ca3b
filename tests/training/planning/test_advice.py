"""The advised change against every setting assessed by hand."""

from __future__ import annotations

import dataclasses

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.training.planning import memory
from megatron_nucleus.training.planning.advice import cheapest_change
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.memory import Work
from tests.training.planning.steps import Case, work_of

PUBLISHED = PRESETS["nucleus_image_17b"]


def seconds(work: Work) -> float:
    """A stand-in for the forecast: recomputation and small pieces take time."""
    return {"none": 1.0, "selective": 1.1, "full": 1.3}[work.recompute] * (1 + 0.05 * work.accumulation)


def test_it_is_the_fastest_that_fits():
    work = dataclasses.replace(work_of(Case(images=8)), recompute="none")
    total = memory.peak(work).total
    limit = int(0.6 * total)
    found = cheapest_change(work, limit, seconds)
    tried = [
        dataclasses.replace(work, recompute=r, batch=MicroBatch(b, *work.batch[1:]), accumulation=8 // b)
        for r in ("none", "selective", "full")
        for b in (1, 2, 4, 8)
    ]
    fitting = [w for w in tried if memory.peak(w).total <= limit]
    assert seconds(found.work) <= 1.01 * min(map(seconds, fitting))
    assert found.total_bytes == memory.peak(found.work).total <= limit
    assert found.work.accumulation * found.work.batch.images == 8
    assert all(flag.startswith(("--micro-batch-size", "--recompute-granularity")) for flag in found.flags)


def test_without_a_batch_to_cut_weights_are_stored_in_16_bits_then_ranks_are_added():
    """17 B parameters in one process: fp32 weights, gradients and momentum alone are 204 GB."""
    work = Work(PUBLISHED, make_layout(1, experts=64), MicroBatch(8, 1024, 64), 1, bf16=True)
    on_one = cheapest_change(work, int(125e9), seconds)
    assert on_one.work.layout.world == 1
    assert on_one.flags[-2:] == ("--master-weights bf16", "--state-dtype bf16")
    on_several = cheapest_change(work, int(70e9), seconds)
    assert on_several.flags[0].endswith(" ranks")
    assert on_several.work.weight_bytes == 4
    before = on_several.work.layout.world // 2
    small = dataclasses.replace(
        work, layout=make_layout(before, experts=64), batch=MicroBatch(1, 1024, 64), recompute="full"
    )
    fewer = [memory.peak(small).total]
    assert before == 1 or min(fewer) > 70e9
    assert cheapest_change(work, int(1e9), seconds) is None


def test_what_cannot_be_changed_stays():
    work = dataclasses.replace(work_of(Case(images=8)), recompute="none")
    found = cheapest_change(work, int(0.6 * memory.peak(work).total), seconds, fixed_recompute=True)
    assert found.work.recompute == "none"
