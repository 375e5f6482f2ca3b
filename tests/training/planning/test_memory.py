"""The planner's memory against what torch really keeps and allocates, on a CPU: all within 10 %."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.core.precision.precision import PrecisionConfig
from megatron_nucleus.training.planning import liveness, memory
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.parameters import parameters
from tests.ranks import run_ranks
from tests.training.planning.steps import SHAPE, WIDE, Case, Measured, Step, measure, model_of, work_of

NEAR = 0.10
MANY_IMAGES = {"images": 64, "grid": (4, 4), "text_tokens": 32}
NARROW_GRID = {"grid": (4, 4), "text_tokens": 16}


def kept_by_plan(case: Case, world: int = 1) -> int:
    """Between forward and backward pass, without what the batch itself holds."""
    walk = memory._Walk(work_of(case, world))
    inputs = {"raw_text", "rotations"}
    stem = liveness.size(walk.stem, liveness.saved(walk.stem) - inputs)
    head = liveness.size(walk.head, liveness.saved(walk.head))
    casts = [walk._casts(part) for part in (walk.stem, walk.head)]
    if case.recompute == "none":
        casts += map(walk._casts, walk.blocks)
    return stem + head + sum(walk.kept) + sum(casts)


@pytest.mark.parametrize("sizes", [{}, MANY_IMAGES])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_what_autograd_saves(sizes, bf16, plain):
    """Unique storages that a forward pass packs, without the weights themselves."""
    case = Case(bf16=bf16, plain=plain, **sizes)
    model = model_of(case)
    step, weights = Step(case, model), {p.untyped_storage().data_ptr() for p in model.parameters()}
    packed: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = step.inputs()
    step.loss(*inputs)  # rotary tables are made once
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss(*inputs)
    expected = sum(t.untyped_storage().nbytes() for at, t in packed.items() if at not in weights)
    assert loss.requires_grad
    assert kept_by_plan(case) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("sizes", [{}, MANY_IMAGES])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", liveness.GRANULARITIES)
def test_one_process(recompute, bf16, sizes):
    """What lies between forward and backward pass, and the peaks of both phases of a step."""
    case = Case(recompute=recompute, bf16=bf16, **sizes)
    measured = measure(case)
    assert kept_by_plan(case) == pytest.approx(measured.kept_bytes, rel=NEAR)
    check(case, [measured])


def check(case: Case, measured: list[Measured]) -> None:
    """Every rank's peaks are near the planned ones."""
    moments = memory.moments(work_of(case, len(measured)))
    planned = max(moments["forward"].total, moments["backward"].total)
    for rank in measured:
        assert planned == pytest.approx(rank.forward_backward, rel=NEAR)
        assert moments["optimizer"].total == pytest.approx(rank.optimizer, rel=NEAR)


@pytest.mark.parametrize(
    "case",
    [
        Case(plain=True),
        Case(accumulation=2, recompute="full"),
        Case(accumulation=2, bf16=True, **NARROW_GRID),
        Case(shape=WIDE, **NARROW_GRID),
    ],
)
def test_one_process_in_other_settings(case):
    check(case, [measure(case)])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case(ep=2)),
        (2, Case(ep=2, recompute="full")),
        (2, Case(ep=2, recompute="selective", bf16=True)),
        (2, Case(ep=2, shape=WIDE, **NARROW_GRID)),  # model memory is most of it
        (2, Case(ep=2, chunks=2)),
        (2, Case(reshard=False)),
        (4, Case(ep=2, replicate=2)),
    ],
)
def test_several_ranks(world, case, tmp_path):
    check(case, run_ranks(world, measure, tmp_path, case))


def test_a_rank_stores_its_share_of_everything():
    layout = make_layout(8, experts=8, ep=4)
    assert layout.efsdp == 2
    stored = {p.name: p.stored(layout) for p in parameters(SHAPE, "muon")}
    assert stored["blocks.1.moe.experts.gate_up"] == 128 * 256  # one of eight experts
    assert stored["blocks.1.modulation.weight"] == 4 * 128 * 128 // 8
    frozen = [p.name for p in parameters(SHAPE, "muon") if not p.trained]
    assert frozen == [f"blocks.{i}.attention.text_q_norm.weight" for i in range(4)]


def test_optimizer_state_of_both_optimizers():
    alone = dataclasses.replace(work_of(Case()), optimizer="adamw")
    total = sum(p.values for p in parameters(SHAPE, "adamw") if p.trained)
    assert memory.moments(alone)["optimizer"].optimizer == 2 * 4 * total
    muon = sum(p.values for p in parameters(SHAPE, "muon") if p.trained and p.split != "-")
    assert memory.moments(work_of(Case()))["optimizer"].optimizer == 4 * (2 * total - muon)


def test_recomputation_and_smaller_batches_take_less():
    plans = [dataclasses.replace(work_of(Case()), recompute=r) for r in liveness.GRANULARITIES]
    totals = [memory.moments(plan)["backward"].total for plan in plans]
    assert totals[0] > totals[1] > totals[2]
    small = dataclasses.replace(plans[0], batch=MicroBatch(1, 256, 40))
    assert memory.peak(small).activations < 0.6 * memory.peak(plans[0]).activations


B16 = ("bf16", "bf16")
EMULATED = PrecisionConfig(fp8="emulated", fp8_recipe="rowwise")


@pytest.mark.parametrize(
    "case",
    [
        Case(bf16=True, stored=B16, shape=WIDE, **NARROW_GRID),
        Case(bf16=True, stored=("fp32", "bf16"), shape=WIDE, accumulation=2, **NARROW_GRID),
        Case(bf16=True, fp8=EMULATED, recompute="selective"),
    ],
)
def test_narrow_weights_averages_and_products(case):
    check(case, [measure(case)])
