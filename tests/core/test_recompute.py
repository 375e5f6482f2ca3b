"""Activation checkpointing: what is kept, what is repeated, and the memory it saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.recompute import _Record, forget, recomputing, replaying
from megatron_nucleus.types import TextFeatures
from tests.core.parallel_cases import SHAPE, build, join
from tests.ranks import run_ranks

LAYERS = 8
DEEP = dataclasses.replace(SHAPE, num_layers=LAYERS, capacity_factors=(0.0,) + (2.0,) * (LAYERS - 1))
GRID = (32, 32)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def forward_growth(granularity: str) -> int:
    """Resident bytes that a forward pass leaves behind until its backward pass."""
    config = ParallelConfig(recompute_granularity=granularity)
    model = build(join(config, DEEP), config, DEEP)
    inputs = torch.randn(4, 1024, SHAPE.patch_channels), torch.rand(4), TextFeatures(torch.randn(4, 5, 24))
    before = resident_bytes()
    out = model(*inputs, GRID)
    growth = resident_bytes() - before
    out.sum().backward()
    return growth


@pytest.mark.dist
def test_recomputation_saves_memory(tmp_path):
    # The smallest of three processes: pages that the allocator happens to take only ever add.
    none, selective, full = (
        min(run_ranks(1, forward_growth, tmp_path, g)[0] for _ in range(3))
        for g in ("none", "selective", "full")
    )
    assert none > 50e6
    assert selective < 0.75 * none
    assert full < 0.6 * selective


def test_choices_are_replayed_not_repeated():
    """The router's choice in the backward pass is that of the forward pass, even if the scores have moved since."""
    scores = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    calls = []

    def choose(x):
        calls.append(replaying())
        best, index = torch.topk(x, 2)
        return (best * torch.tensor([1.0, 10.0])).sum() + x.gather(1, index).exp().sum()

    out = recomputing(choose, "full")(scores)
    now = torch.tensor([[2.0, 3.0, 1.0]])  # others would be chosen
    scores.data.copy_(now)  # behind autograd's back
    out.backward()
    assert calls == [False, True]
    taken = torch.tensor([[1.0, 0.0, 1.0]])
    expected = torch.tensor([[1.0, 0.0, 10.0]]) + now.exp() * taken
    torch.testing.assert_close(scores.grad, expected)


def experts_and_way_back(recompute: bool, drop: bool = True) -> tuple[list[torch.Tensor], int]:
    """(gradients, bytes that are kept) of two products, the second of which goes into a kept operation."""
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(16, 16, generator=generator).requires_grad_() for _ in range(3))

    def send(x, first, second):
        out = torch.mm(torch.mm(x, first).sigmoid(), second)
        if drop:
            forget(out)
        best, _ = torch.topk(out.unflatten(0, (4, 4)).transpose(0, 1).flatten(), 40)
        return best.exp().sum()

    results = []
    if recompute:
        send = recomputing(send, "selective")
        made = _Record.__init__

        def noted(self, kept, found):
            results.append(found)
            made(self, kept, found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Record, "__init__", noted)
            loss = send(x, first, second)
        kept = sum(out.nbytes for _, out in results[0] if isinstance(out, torch.Tensor))
    else:
        loss, kept = send(x, first, second), 0
    loss.backward()
    return [x.grad, first.grad, second.grad], kept


def test_a_forgotten_result_is_not_kept_and_changes_no_gradient():
    plain, _ = experts_and_way_back(False)
    kept, most = experts_and_way_back(True, drop=False)
    dropped, fewer = experts_and_way_back(True)
    for a, b, c in zip(plain, kept, dropped, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert most - fewer == 16 * 16 * 4


def test_a_reader_of_a_forgotten_result_does_not_go_unnoticed():
    x = torch.ones(4, 4, requires_grad=True)

    def read_again(x):
        out = torch.mm(x, x)
        forget(out)
        return out.square().sum()

    loss = recomputing(read_again, "selective")(x)
    assert loss == 256
    loss.backward()
    assert x.grad.isnan().all()
