"""The all-to-all dispatcher against the local one, and what happens when ranks bring different shapes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.collectives import ShapeAgreement, on_first_rank
from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.moe.dispatcher import AllToAllDispatcher, LocalDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.types import Routing, TextFeatures
from megatron_nucleus.utils.errors import DataError
from tests.core.parallel_cases import SHAPE, build, join
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
B, S, E, C, D, F = 12, 10, 8, 3, 6, 5  # B: images over all ranks


def problem(images: slice) -> tuple[torch.Tensor, torch.Tensor, Routing, torch.Tensor]:
    """Tokens, base, routing and the output's gradient of some of the images, fp64."""
    g = torch.Generator().manual_seed(0)
    x, base, grad = (torch.randn(B, S, D, generator=g, dtype=torch.float64)[images] for _ in range(3))
    index = torch.rand(B, E, S, generator=g).argsort(-1)[:, :, :C][images].contiguous()
    weight = torch.rand(B, E, C, generator=g, dtype=torch.float64)[images].requires_grad_()
    return x.requires_grad_(), base.requires_grad_(), Routing(index, weight, weight), grad


def make_experts(first: int, count: int) -> Experts:
    g = torch.Generator().manual_seed(1)
    experts = Experts(count, D, F, resolve_kernels()).double()
    gate_up = torch.randn(E, D, 2 * F, generator=g, dtype=torch.float64)
    down = torch.randn(E, F, D, generator=g, dtype=torch.float64)
    with torch.no_grad():
        experts.gate_up.copy_(gate_up[first : first + count])
        experts.down.copy_(down[first : first + count])
    return experts


def through(dispatcher: LocalDispatcher, experts: Experts, images: slice) -> dict[str, np.ndarray]:
    """Output and every gradient of tokens -> experts -> tokens."""
    x, base, routing, grad = problem(images)
    out = dispatcher.combine(base, experts(dispatcher.dispatch(x, routing), dispatcher), routing)
    out.backward(grad)
    grads = {"x": x, "base": base, "weight": routing.weight_BEC, **dict(experts.named_parameters())}
    return {"out": out.detach().numpy()} | {name: t.grad.numpy() for name, t in grads.items()}


def rank_through(chunks: int, overlap: bool) -> dict[str, np.ndarray]:
    rank, world = dist.get_rank(), dist.get_world_size()
    dispatcher = AllToAllDispatcher(resolve_kernels(), dist.group.WORLD, chunks=chunks, overlap=overlap)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    return through(dispatcher, make_experts(rank * E // world, E // world), mine)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 4), (4, 1), (4, 2), (4, 3)])
def test_all_to_all_equals_local_forward_and_backward(world, chunks, overlap, tmp_path):
    parts = run_ranks(world, rank_through, tmp_path, chunks, overlap)
    expected = through(LocalDispatcher(resolve_kernels()), make_experts(0, E), slice(None))
    for name, value in expected.items():  # images and experts are both cut along their first axis
        together = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(together, value, rtol=1e-12, atol=1e-12, err_msg=name)


def round_trip(chunks: int) -> bool:
    dispatcher = AllToAllDispatcher(resolve_kernels(), dist.group.WORLD, chunks=chunks)
    x, base, routing, _ = problem(slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3))
    pieces = tuple(dispatcher.give_back(dispatcher.arrive(p)) for p in dispatcher.dispatch(x, routing))
    local = LocalDispatcher(resolve_kernels())
    expected = local.combine(base, local.dispatch(x, routing), routing)
    return torch.equal(dispatcher.combine(base, pieces, routing), expected)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_rows_come_back_to_their_tokens_bit_for_bit(chunks, tmp_path):
    assert run_ranks(4, round_trip, tmp_path, chunks) == [True] * 4


def too_many_chunks() -> str:
    dispatcher = AllToAllDispatcher(resolve_kernels(), dist.group.WORLD, chunks=4)
    x, _, routing, _ = problem(slice(0, 3))
    with pytest.raises(ValueError, match="3 images and 8 experts cannot be cut into 4 chunks") as error:
        dispatcher.dispatch(x, routing)
    return str(error.value)


def test_more_chunks_than_images_is_an_error(tmp_path):
    assert "--moe-overlap-chunks" in run_ranks(2, too_many_chunks, tmp_path)[0]


def forward_with(shapes: list[tuple[int, tuple[int, int]]]) -> str:
    """Every rank forwards its own shape; the error's text, or that there was none."""
    config = ParallelConfig(expert_model_parallel_size=dist.get_world_size())
    model = build(join(config), config)
    images, grid = shapes[dist.get_rank()]
    latents = torch.zeros(images, grid[0] * grid[1], SHAPE.patch_channels)
    text = TextFeatures(torch.zeros(images, 2, SHAPE.text_dim))
    try:
        model(latents, sigma_B=torch.zeros(images), text=text, grid=grid)
    except ValueError as error:
        return str(error)
    return "no error"


def test_different_shapes_raise_on_every_rank_and_name_ranks_and_shapes(tmp_path):
    answers = run_ranks(3 + 1, forward_with, tmp_path, [(2, (3, 4)), (2, (4, 3)), (2, (3, 4)), (1, (3, 4))])
    assert answers == [answers[0]] * 4
    for part in (
        "ranks 0, 2 have 2 images of 3 x 4",
        "ranks 1 have 2 images of 4 x 3",
        "ranks 3 have 1 images",
    ):
        assert part in answers[0]
    assert run_ranks(2, forward_with, tmp_path, [(2, (3, 4))] * 2) == ["no error"] * 2


def agree_often() -> int:
    agreement = ShapeAgreement(dist.group.WORLD)
    for step in range(50):
        agreement.check(1 + step % 3, (2, 3))
    return 50


def test_equal_shapes_agree(tmp_path):
    assert run_ranks(2, agree_often, tmp_path) == [50, 50]


def first_rank_fails() -> str:
    def action() -> None:
        raise DataError(f"broken on rank {dist.get_rank()}")

    with pytest.raises(DataError) as error:
        on_first_rank(action, dist.group.WORLD)
    assert on_first_rank(lambda: dist.get_rank() + 7, dist.group.WORLD) == 7
    return str(error.value)


def test_what_rank_0_does_alone_ends_the_same_everywhere(tmp_path):
    assert run_ranks(3, first_rank_fails, tmp_path) == ["broken on rank 0"] * 3


# Shapes alone, without any value: whatever asks a tensor for a number (a count, a size that depends on the routing)
# raises there, as it would stall a GPU.
WITHOUT_VALUES = """
import torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_nucleus.core.kernels import KernelConfig, resolve_kernels
from megatron_nucleus.core.moe.dispatcher import AllToAllDispatcher
from megatron_nucleus.core.moe.experts import Experts
from megatron_nucleus.core.moe.router import Router

dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
kernels = resolve_kernels(KernelConfig(moe_combine_backend="torch", expert_ffn_backend="torch"))
with FakeTensorMode():
    router = Router(6, 8, 2.0, False, 2.5, kernels)
    experts = Experts(2, 6, 5, kernels)
    x, temb = torch.randn(3, 10, 6, requires_grad=True), torch.randn(3, 6)
    for chunks in (1, 3):
        dispatcher = AllToAllDispatcher(kernels, dist.group.WORLD, chunks=chunks)
        routing = router(x, temb)
        rows = dispatcher.dispatch(x, routing)
        out = dispatcher.combine(x, experts(rows, dispatcher), routing)
        out.sum().backward()
        assert out.shape == x.shape and x.grad.shape == x.shape
        assert [tuple(r.shape) for r in rows] == [(8, 3 // chunks * 3, 6)] * chunks
        C = 3
        assert dispatcher.traffic.take() == 4 * 8 * 3 * C * 6 * 4
print("no value was read")
"""


def test_no_shape_depends_on_a_value():
    done = subprocess.run([sys.executable, "-c", WITHOUT_VALUES], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "no value was read", done.stderr[-3000:]
