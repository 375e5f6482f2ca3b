"""Turning router rows apart: the penalty by autograd, what it does to rows, and the same over ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nucleus.core.optimizer.optimizer import Optimizer, OptimizerConfig, build_optimizer
from megatron_nucleus.core.optimizer.router_orthogonality import RouterOrthogonality, penalty_gradient
from megatron_nucleus.core.parallel_state import create_groups, make_layout
from megatron_nucleus.utils.errors import ConfigError
from tests.ranks import run_ranks

LAYERS, EXPERTS, FEATURES = 3, 5, 12  # four ranks hold 2, 2, 1 and 0 rows, two ranks 3 and 2
STEPS, LR = 3, 0.01
CONFIG = OptimizerConfig(lr=LR, router_orthogonality=0.05)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GRIDS = {2: (1, 2), 4: (1, 2, 4)}  # world: copies
CASES = [(world, replicate, dtype) for world in GRIDS for replicate in GRIDS[world] for dtype in DTYPES]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def penalty(rows_EF: Tensor) -> Tensor:
    """Sum over pairs of cos^2, written out."""
    pairs = itertools.combinations(rows_EF, 2)
    return sum((a @ b / (a.norm() * b.norm())) ** 2 for a, b in pairs)


def new_model(dtype: torch.dtype) -> nn.Module:
    """Nothing but routers, named as in the real model; the rows share a direction."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in range(LAYERS))
    for layer, block in enumerate(model.blocks):
        block.moe = nn.Module()
        block.moe.router = nn.Linear(FEATURES, EXPERTS, bias=False, dtype=dtype)
        with torch.no_grad():
            block.moe.router.weight.copy_(normal(EXPERTS, FEATURES, seed=layer) + 1.0)
    return model


def routers_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("router.weight")}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def take_steps(model: nn.Module, optimizer: Optimizer, first_row: int = 0) -> None:
    for step in range(1, STEPS + 1):
        for layer, p in enumerate(model.parameters()):
            p.grad = torch.zeros_like(p)
            held = local(p.grad)
            held.copy_(normal(EXPERTS, FEATURES, seed=100 * step + layer)[first_row : first_row + len(held)])
        optimizer.step(LR * step / STEPS)


def only_orthogonality(model: nn.Module, config: OptimizerConfig, lr: float) -> list[Tensor]:
    """What one step without gradients and decay adds to every router."""
    optimizer = build_optimizer(model, config)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr)
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


# The formula


@pytest.mark.parametrize(("experts", "features"), [(2, 3), (5, 12), (9, 4)])
def test_gradient_equals_autograd_of_the_penalty(experts, features):
    rows = (3 * normal(2, experts, features)).requires_grad_()
    (expected,) = torch.autograd.grad(penalty(rows[0]) + penalty(rows[1]), rows)
    got = penalty_gradient(rows.detach(), 0, experts)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    for first, count in ((0, 1), (1, experts - 1)):  # what a rank computes that holds some of the rows
        part = penalty_gradient(rows.detach(), first, count)
        torch.testing.assert_close(part, expected[:, first : first + count], rtol=1e-11, atol=1e-13)
    along = (got * rows.detach()).sum(-1)
    torch.testing.assert_close(
        along, torch.zeros_like(along), rtol=0, atol=1e-12
    )  # at right angles to each row


def test_orthogonal_rows_rest_and_rows_of_zeros_are_as_if_not_there():
    assert penalty_gradient(3 * torch.eye(4)[None], 0, 4).count_nonzero() == 0
    rows = normal(1, 4, 6)
    with_zero = torch.cat([rows[:, :2], torch.zeros(1, 1, 6, dtype=rows.dtype), rows[:, 2:]], dim=1)
    got, without = penalty_gradient(with_zero, 0, 5), penalty_gradient(rows, 0, 4)
    assert got[0, 2].count_nonzero() == 0
    torch.testing.assert_close(got[:, [0, 1, 3, 4]], without, rtol=1e-12, atol=1e-14)
    assert penalty_gradient(torch.zeros(1, 3, 4), 0, 3).count_nonzero() == 0


def mean_cosine(rows_EF: Tensor) -> float:
    unit = rows_EF / rows_EF.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).abs()
    return float((cosine.sum() - cosine.trace()) / (len(cosine) * (len(cosine) - 1)))


def test_many_updates_end_at_right_angles_and_keep_the_lengths():
    lengths = torch.tensor([0.5, 1.0, 1.0, 1.5, 2.0, 1.0], dtype=torch.float64)
    rows = normal(6, 32) * 0.3 + normal(1, 32, seed=1)
    router = nn.Parameter(rows / rows.norm(dim=1, keepdim=True) * lengths[:, None])
    update = RouterOrthogonality({"router": router}, coefficient=0.001, peak_lr=LR)
    cosines = [mean_cosine(router.detach())]
    for _ in range(4):
        for _ in range(1500):
            update.start()
            update.finish(LR)
        cosines.append(mean_cosine(router.detach()))
    assert cosines[0] > 0.7
    assert cosines[-1] < 1e-3
    assert cosines == sorted(cosines, reverse=True)
    torch.testing.assert_close(router.detach().norm(dim=1), lengths, rtol=0.01, atol=0)


# In the optimizer


@pytest.mark.parametrize("lr", [LR, LR / 4, 0.0])
def test_a_step_adds_eta_times_coefficient_times_the_gradient(lr):
    """eta = lr / peak lr: the schedule's multiplier, not the rate."""
    config = OptimizerConfig(lr=LR, router_orthogonality=0.05, weight_decay=0.0)
    model = new_model(torch.float64)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    gradients = torch.autograd.grad(sum(penalty(w) for w in weights), weights)
    for moved, gradient in zip(only_orthogonality(model, config, lr), gradients, strict=True):
        torch.testing.assert_close(moved, -0.05 * (lr / LR) * gradient, rtol=1e-10, atol=1e-14)


def test_the_published_coefficient_moves_fp32_weights_of_initial_size():
    """Rows of length 0.1 with common directions; times the rate itself nothing would move."""
    model = new_model(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1 / p.norm(dim=1, keepdim=True))
    assert OptimizerConfig().router_orthogonality == 1e-7
    for moved in only_orthogonality(model, OptimizerConfig(weight_decay=0.0), 1e-4):
        assert float((moved != 0).float().mean()) > 0.9


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(lr=LR, weight_decay=0.0, router_orthogonality=0.0),
        OptimizerConfig(lr=LR, weight_decay=0.0, router_orthogonality=0.05, lr_factors=("router=0",)),
        OptimizerConfig(lr=0.0, weight_decay=0.0, router_orthogonality=0.05),
    ],
    ids=["coefficient", "factor", "lr"],
)
def test_zero_does_nothing(config):
    model = new_model(torch.float64)
    assert build_optimizer(model, config).orthogonality is None
    assert all(moved.count_nonzero() == 0 for moved in only_orthogonality(model, config, config.lr))


def test_beside_adamw_it_is_a_term_of_its_own():
    """Neither gradients nor decay of AdamW see it: one step is AdamW's own step plus the turn of the old weights."""
    turned, plain = new_model(torch.float64), new_model(torch.float64)
    for p, q in zip(turned.parameters(), plain.parameters(), strict=True):
        p.grad, q.grad = normal(*p.shape), normal(*p.shape)
    old = torch.stack([p.detach() for p in turned.parameters()])
    off = OptimizerConfig(lr=LR, router_orthogonality=0.0)
    build_optimizer(turned, CONFIG).step(LR)
    build_optimizer(plain, off).step(LR)
    difference = torch.stack(
        [p.detach() - q for p, q in zip(turned.parameters(), plain.parameters(), strict=True)]
    )
    turn = -CONFIG.router_orthogonality * penalty_gradient(old, 0, EXPERTS)
    decay = 1 - LR * CONFIG.weight_decay  # AdamW shrinks the turned row
    torch.testing.assert_close(difference.detach(), decay * turn, rtol=1e-9, atol=1e-14)


def test_a_refused_step_applies_nothing():
    model = new_model(torch.float64)
    optimizer = build_optimizer(model, CONFIG)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match="no gradient"):
        optimizer.step(LR)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_frozen_routers_stay():
    model = new_model(torch.float64)
    model.blocks[1].requires_grad_(False)
    assert len(build_optimizer(model, CONFIG).orthogonality.routers) == LAYERS - 1
    model.requires_grad_(False)
    assert build_optimizer(model, CONFIG).orthogonality is None


def test_routers_that_differ_are_refused():
    routers = {"a": nn.Parameter(torch.ones(4, 6)), "b": nn.Parameter(torch.ones(5, 6))}
    with pytest.raises(ConfigError, match=r"router_orthogonality: 'b' is \[5, 6\].*'a' is \[4, 6\]"):
        RouterOrthogonality(routers, 1e-7, LR)


# Over ranks


class Messages(TorchDispatchMode):
    """Notes the collectives of this process with the bytes that each is given."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.seen.append((func.name().split("::")[1], args[0].nbytes))
        return func(*args, **(kwargs or {}))


def train_sharded(replicate: int, dtype_name: str, config: OptimizerConfig = CONFIG) -> dict:
    layout = make_layout(dist.get_world_size(), experts=4, replicate=replicate)
    model = new_model(DTYPES[dtype_name])
    mesh = create_groups(layout, torch.device("cpu"), 0, 60.0).dense_mesh
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, config)
    shard = layout.coordinates(dist.get_rank())["shard"]
    with Messages() as messages:
        take_steps(model, optimizer, first_row=shard * -(-EXPERTS // layout.shard))
    return {
        "weights": [local(p).detach().numpy().copy() for p in model.parameters()],
        "messages": messages.seen,
        "traffic": optimizer.orthogonality.traffic() if optimizer.orthogonality else None,
    }


def all_cases(world: int) -> dict:
    results = {(world, r, dtype): train_sharded(r, dtype) for r in GRIDS[world] for dtype in DTYPES}
    return results | {
        "off": train_sharded(1, "float32", OptimizerConfig(lr=LR, router_orthogonality=0.0)),
        "by columns": refusal(),
    }


def refusal() -> str:
    mesh = create_groups(
        make_layout(dist.get_world_size(), experts=4), torch.device("cpu"), 0, 60.0
    ).dense_mesh
    model = fully_shard(new_model(torch.float32), mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(ConfigError) as error:
        build_optimizer(model, CONFIG)
    return str(error.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """{case: one result per rank}."""
    found = {}
    for world in GRIDS:
        ranks = run_ranks(world, all_cases, Path(tmp_path_factory.mktemp(f"world{world}")), world)
        found |= {
            (world, case) if isinstance(case, str) else case: [r[case] for r in ranks] for case in ranks[0]
        }
    return found


@pytest.fixture(scope="module")
def expected() -> dict:
    weights = {}
    for name, dtype in DTYPES.items():
        model = new_model(dtype)
        take_steps(model, build_optimizer(model, CONFIG))
        weights[name] = [p.detach().numpy() for p in model.parameters()]
    return weights


each_case = pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])


@pytest.mark.dist
@each_case
def test_ranks_equal_one_process(case, results, expected):
    world, replicate, dtype = case
    limit = {"float32": 1e-6, "float64": 1e-12}[dtype]
    shards = world // replicate
    for layer, whole in enumerate(expected[dtype]):
        for copy in range(replicate):
            ranks = results[case][copy * shards : (copy + 1) * shards]
            together = np.concatenate([rank["weights"][layer] for rank in ranks])
            assert np.linalg.norm(together - whole) < limit * np.linalg.norm(whole)
            first = np.concatenate([rank["weights"][layer] for rank in results[case][:shards]])
            assert np.array_equal(together, first), "copies keep the same bits"
        start = (normal(EXPERTS, FEATURES, seed=layer) + 1.0).numpy()
        assert mean_cosine(torch.from_numpy(whole).double()) < mean_cosine(torch.from_numpy(start))


@pytest.mark.dist
@each_case
def test_one_message_a_step_of_the_bytes_told(case, results):
    """Each rank sends its rows of all routers, padded to the longest block, to the other ranks of its group."""
    world, replicate, dtype = case
    shards = world // replicate
    line = LAYERS * -(-EXPERTS // shards) * FEATURES * DTYPES[dtype].itemsize
    for rank in results[case]:
        assert rank["messages"] == ([("all_gather_into_tensor", line)] * STEPS if shards > 1 else [])
        assert rank["traffic"] == (shards - 1) * line


@pytest.mark.dist
@pytest.mark.parametrize("world", GRIDS)
def test_nobody_talks_where_it_is_off(world, results):
    for rank in results[world, "off"]:
        assert rank["messages"] == []
        assert rank["traffic"] is None


@pytest.mark.dist
@pytest.mark.parametrize("world", GRIDS)
def test_rows_cut_by_columns_are_refused(world, results):
    for message in results[world, "by columns"]:
        assert "optimizer.router_orthogonality: 'blocks.0.moe.router.weight'" in message
        assert "Shard(dim=1)" in message
