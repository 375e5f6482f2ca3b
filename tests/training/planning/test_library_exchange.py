"""What is kept of a step whose tokens a library carries, with an exchange that stays in this process."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from megatron_nucleus.core.moe.exchange_dispatcher import ExchangeDispatcher
from megatron_nucleus.training.planning import library_exchange, memory
from megatron_nucleus.training.planning.ledger import Ledger, MicroBatch, Numerics
from megatron_nucleus.training.planning.liveness import GRANULARITIES
from megatron_nucleus.training.planning.operations import block
from tests.training.planning.allocations import count_allocations
from tests.training.planning.steps import SHAPE, Case, Step, model_of, work_of
from tests.training.planning.test_memory import kept_by_plan


class Here:
    """All experts on this rank: rows are copies of tokens, and come back added up. The trip is the rows' tokens."""

    def dispatch(self, x_TD: Tensor, taken_TE: Tensor, weight_TE: Tensor, rows: int):
        index_N = taken_TE.t().nonzero()[:, 1].clone()
        expert_N = torch.arange(taken_TE.shape[1]).repeat_interleave(rows)
        return x_TD[index_N], weight_TE[index_N, expert_N], (index_N, x_TD.shape[0], weight_TE.shape[1])

    def dispatch_again(self, x_TD: Tensor, trip) -> Tensor:
        return x_TD[trip[0]]

    def combine(self, rows_ND: Tensor, trip, scale_N=None, weight_N=None):
        index_N, tokens, experts = trip
        if scale_N is not None:
            rows_ND = rows_ND * scale_N.unsqueeze(-1)
        x_TD = rows_ND.new_zeros(tokens, rows_ND.shape[1]).index_add(0, index_N, rows_ND)
        if weight_N is None:
            return x_TD, None
        expert_N = torch.arange(experts).repeat_interleave(len(index_N) // experts)
        return x_TD, weight_N.new_zeros(tokens, experts).index_put((index_N, expert_N), weight_N)


@pytest.mark.parametrize("recompute", GRANULARITIES)
def test_what_lies_between_forward_and_backward_pass(recompute):
    model = model_of(Case(recompute=recompute))
    for part in model.blocks:
        if part.is_moe:
            part.moe.dispatcher = ExchangeDispatcher(Here(), 1)
    step = Step(Case(), model)
    for _ in range(2):  # the first fills what stays for good
        gc.collect()
        with count_allocations() as forward:
            loss = step.loss(*step.inputs())
        loss.backward()
        del loss
        model.zero_grad()
    planned = kept_by_plan(Case(recompute=recompute, ep=2, dispatcher="hybridep"), world=2)
    assert planned == pytest.approx(forward.kept_bytes, rel=0.05)


def test_the_published_layer_by_hand():
    """EP 64, 16,384 tokens a rank: DeepEP returns a row for each of 2^20 tokens of the group, in two rounds."""
    T, D, E = 16384, 2048, 64
    out = Ledger(Numerics(True, True, ep=64, exchange="deepep"))
    for name in ("m2", "weight", "shared_out", "expert_out"):
        out.tensor(name, 1)
    rows = 131072
    library_exchange.dispatch(out, T, rows, D, E)
    library_exchange.give_back(out, T, rows, D, E)
    assert out.bytes["arrived"] == rows * D * 2
    assert out.bytes["whole_group"] == 2 * 64 * T * D * 2 == 8 * 2**30
    assert out.bytes["way_back"] == 2 * rows * D * 4 + 64 * T * D * (4 + 2)
    names = {op.name: op for op in out.ops}
    assert set(names["return"].saves) == {"expert_out", "arrived_weight"}
    assert names["dispatch"].grad_bytes == out.bytes["way_back"]


def test_it_is_part_of_the_peak():
    """An all-to-all needs no row for every token of the group."""
    sizes = {"images": 4, "ep": 8, "bf16": True}
    plain, deepep, hybridep = (
        memory.peak(work_of(Case(**sizes, dispatcher=name), world=8)) for name in ("alltoall", "deepep", "hybridep")
    )  # fmt: skip
    group_rows = 8 * 4 * 256 * SHAPE.width * 2
    assert deepep.activations > plain.activations + group_rows
    assert deepep.activations > hybridep.activations
    assert {deepep.weights, hybridep.weights} == {plain.weights}


def test_the_model_is_the_same_arithmetic():
    parts = [
        block(SHAPE, 1, MicroBatch(2, 256, 40), Numerics(True, True, ep=2, exchange=name))
        for name in ("alltoall", "deepep", "hybridep")
    ]
    assert len({part.flops for part in parts}) == len({part.grad_flops for part in parts}) == 1
