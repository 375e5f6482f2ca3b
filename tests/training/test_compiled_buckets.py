"""Compiled blocks: a fixed number of graphs for the seven buckets, however often they come, and the eager values."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core import parallelize as spreading
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.parallel_state import ParallelConfig, single_process
from megatron_nucleus.data.buckets import BUCKETS, size
from megatron_nucleus.types import TextFeatures
from tests.shapes import TINY

MULTIPLE_PX, BASE_PX = 16, 128  # grids of about 8 x 8 tokens, seven different ones
GRIDS = [(height // MULTIPLE_PX, width // MULTIPLE_PX) for width, height in
         (size(bucket, BASE_PX, MULTIPLE_PX) for bucket in BUCKETS)]  # fmt: skip


# Of the dense block one; of the other what stands before and behind its routing, and the shared expert.
PIECES = 4


@pytest.fixture
def graphs(monkeypatch):
    """What was traced, in order. The graphs run as they are: how many there are is settled before code is made."""
    found: list[torch.fx.GraphModule] = []
    real = torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(spreading.torch, "compile", lambda function: real(function, backend=backend))
    yield found
    torch._dynamo.reset()


def inputs(grid: tuple[int, int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, grid[0] * grid[1], TINY.patch_channels, generator=generator)
    text = torch.randn(2, 5, TINY.text_dim, generator=generator)
    return latents, torch.rand(2, generator=generator), TextFeatures(text), grid


def step(model: NucleusTransformer, grid: tuple[int, int], seed: int) -> list[torch.Tensor]:
    """Output and all gradients."""
    model.zero_grad(set_to_none=True)
    out = model(*inputs(grid, seed))
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_buckets_have_different_grids():
    assert len(set(GRIDS)) == len(BUCKETS)


def test_graphs_are_as_many_after_every_round(graphs):
    plain, compiled = NucleusTransformer(TINY, seed=3), NucleusTransformer(TINY, seed=3)
    for model in (plain, compiled):  # gates that start at zero would hide the blocks
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    alone = single_process(torch.device("cpu"), TINY.num_experts)
    spreading.parallelize(compiled, ParallelConfig(compile_blocks=True), alone)
    counts = []
    for seed, grid in enumerate(2 * GRIDS):
        for ours, expected in zip(step(compiled, grid, seed), step(plain, grid, seed), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert counts[0] == PIECES
    # The second bucket shows the compiler which sizes change; its graphs serve all buckets after it.
    assert counts[1:] == [counts[1]] * (2 * len(GRIDS) - 1)
    assert counts[1] <= 2 * PIECES
