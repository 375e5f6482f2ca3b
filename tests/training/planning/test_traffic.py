"""The planner's bytes against those that real ranks exchange."""

from __future__ import annotations

import math

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallelize import expert_bytes_exchanged
from megatron_nucleus.training.planning.traffic import all_to_all_bytes, fsdp_bytes
from tests.ranks import run_ranks
from tests.training.planning.steps import Case, Step, model_of, work_of

pytestmark = pytest.mark.dist
SMALL = {"grid": (4, 4), "text_tokens": 5}


class Collectives(TorchDispatchMode):
    """Bytes that a rank sends in each kind of collective, as a ring would: (n-1)/n of what is gathered or reduced."""

    def __init__(self):
        super().__init__()
        self.bytes = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op)
        if name.startswith("c10d."):
            self._count(name, args)
        return op(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if "allgather" in name or "all_gather" in name:
            out, source = args[0], args[1]
            self.bytes["all_gather"] += out.nbytes - source.nbytes
        elif "reduce_scatter" in name:
            out, source = args[0], args[1]
            self.bytes["reduce_scatter"] += source.nbytes - out.nbytes
        elif "allreduce" in name:
            (tensor,) = args[0]
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.bytes["all_reduce"] += 2 * tensor.nbytes * (ranks - 1) // ranks


def exchanged(case: Case) -> tuple[int, dict[str, int], dict[str, int]]:
    """(all-to-all, FSDP by kind, Muon by stage) of one step of this rank."""
    model = model_of(case)
    step = Step(case, model)
    optimizer = build_optimizer(model, OptimizerConfig(muon_dtype="fp32"))
    step.loss(*step.inputs()).backward()
    optimizer.zero_grad()
    expert_bytes_exchanged(model)
    with Collectives() as collectives:
        for number in range(case.accumulation):
            model.set_requires_all_reduce(number == case.accumulation - 1)
            step.loss(*step.inputs()).backward()
    return expert_bytes_exchanged(model), collectives.bytes, optimizer.muon.traffic()


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case(**SMALL)),
        (2, Case(ep=2, chunks=2, bf16=True, **SMALL)),
        (3, Case(reshard=False, **SMALL)),  # no number of rows is a multiple of the ranks
        (2, Case(ep=2, recompute="full", **SMALL)),
        (4, Case(ep=2, replicate=2, accumulation=2, **SMALL)),
        (4, Case(ep=2, accumulation=2, **SMALL)),
    ],
)
def test_bytes_of_a_real_step(world, case, tmp_path):
    work = work_of(case, world)
    results = run_ranks(world, exchanged, tmp_path, case)
    for tokens, fsdp, _ in results:
        assert tokens == all_to_all_bytes(work)
        planned = fsdp_bytes(work)
        assert {kind: fsdp[kind] for kind in planned} == pytest.approx(planned, rel=1e-4)
    stages = [muon for _, _, muon in results]
    most = {stage: max(rank[stage] for rank in stages) for stage in stages[0]}
    assert work.muon().sent_bytes == most


def test_published_grid_by_hand():
    """64 ranks, one expert each: four exchanges per MoE layer of C * 64 * B rows of 2048 bf16 values."""
    from megatron_nucleus.core.models.presets import PRESETS
    from megatron_nucleus.core.parallel_state import make_layout
    from megatron_nucleus.training.planning.ledger import MicroBatch
    from megatron_nucleus.training.planning.memory import Work

    shape = PRESETS["nucleus_image_17b"]
    work = Work(shape, make_layout(64, experts=64, ep=64), MicroBatch(4, 4096, 128), 1, True)
    capacities = [math.ceil(f * 4096 / 64) for f in shape.capacity_factors[3:]]
    assert all_to_all_bytes(work) == 4 * 4 * 64 * sum(capacities) * 2048 * 2
