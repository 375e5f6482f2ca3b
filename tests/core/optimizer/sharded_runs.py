"""A model of every kind of parameter, trained by one process or by the ranks of a grid, for `test_sharded.py`."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nucleus.core.optimizer import exchange
from megatron_nucleus.core.optimizer.clip import clip_gradients, local_square_sum
from megatron_nucleus.core.optimizer.optimizer import Optimizer, OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import Layout, create_groups, make_layout
from megatron_nucleus.utils.errors import ConfigError

EXPERTS = 4
SHAPES = {  # four ranks cut 5 rows as 2 2 1 0, 3 rows as 1 1 1 0, 18 rows of gate and up as 5 5 5 3
    "image_in.weight": (7, 5),
    "image_in.bias": (7,),
    "time_embed.norm.weight": (1,),
    "blocks.0.attention.q.weight": (16, 8),
    "blocks.0.attention.k.weight": (5, 12),
    "blocks.0.attention.out.weight": (12, 5),
    "blocks.0.attention.text_v.weight": (3, 10),
    "blocks.0.attention.text_q_norm.weight": (4,),
    "blocks.0.feed_forward.gate_up.weight": (18, 8),
    "blocks.0.feed_forward.down.weight": (8, 9),
    "blocks.1.moe.router.weight": (EXPERTS, 16),
    "blocks.1.moe.shared_expert.gate_up.weight": (12, 8),
    "blocks.1.moe.experts.gate_up": (EXPERTS, 8, 12),
    "blocks.1.moe.experts.down": (EXPERTS, 6, 8),
}
FROZEN = "blocks.0.attention.text_q_norm.weight"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GRIDS = {  # world: (replicate, ep)
    1: [(1, 1)],
    2: list(itertools.product((1, 2), (1, 2))),
    4: list(itertools.product((1, 2, 4), (1, 2, 4))),
}
CASES = [(world, *grid, dtype) for world in GRIDS for grid in GRIDS[world] for dtype in DTYPES]
CONFIG = OptimizerConfig(
    weight_decay=0.1, lr_factors=("attention=0.5", "experts=2"), router_orthogonality=1e-4
)
LOW_PRECISION = dataclasses.replace(CONFIG, muon_dtype="bf16")
STEPS, LR, MAX_NORM = 3, 0.01, 5.0


def full_values(name: str, kind: int, dtype: torch.dtype) -> Tensor:
    """Initial value (kind 0) or gradient of step ``kind`` of a whole parameter: alike on all ranks."""
    generator = torch.Generator().manual_seed(100 * list(SHAPES).index(name) + kind)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def new_model(dtype: torch.dtype, names=tuple(SHAPES)) -> nn.Module:
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(
            last, nn.Parameter(full_values(name, 0, dtype), requires_grad=name != FROZEN)
        )
    return model


def part_of(full: Tensor, name: str, layout: Layout, rank: int) -> Tensor:
    """What ``rank`` holds of a parameter-shaped value."""
    if ".experts." in name:
        return full[layout.experts_of(rank)]
    blocks = full.chunk(layout.shard)
    at = layout.coordinates(rank)["shard"]
    return blocks[at] if at < len(blocks) else full[:0]


def set_gradients(model: nn.Module, step: int, dtype: torch.dtype, layout: Layout | None = None) -> None:
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        full = full_values(name, step, dtype)
        if layout is None:
            param.grad = full
        else:
            param.grad = torch.zeros_like(param)
            param.grad.to_local().copy_(part_of(full, name, layout, dist.get_rank()))


def parameter_of(state_name: str) -> str:
    return state_name.split(".", 2)[2]


def train(model: nn.Module, optimizer: Optimizer, dtype: torch.dtype, layout: Layout | None = None) -> list:
    """Clipped steps; returns the norms before clipping."""
    norms = []
    for step in range(1, STEPS + 1):
        set_gradients(model, step, dtype, layout)
        group = None if layout is None else dist.group.WORLD
        norms.append(float(clip_gradients(optimizer.params.values(), MAX_NORM, group).norm))
        optimizer.step(LR * step)
    return norms


class Witness(TorchDispatchMode):
    """Notes operations that go through DTensor's own dispatch."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(t, DTensor) for t in torch.utils._pytree.tree_leaves((args, kwargs))):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Meter:
    """Counts the bytes that leave this rank through the exchange's collectives."""

    def __init__(self):
        self.bytes: list[tuple[str, int]] = []
        self._all_to_all, self._all_gather = dist.all_to_all_single, exchange._all_gather

    def all_to_all(self, output, values, output_splits, input_splits, group, async_op):
        assert output.numel() == sum(output_splits)
        others = sum(input_splits) - input_splits[dist.get_rank(group)]
        self.bytes.append(("all-to-all", others * values.element_size()))
        return self._all_to_all(output, values, output_splits, input_splits, group=group, async_op=async_op)

    def all_gather(self, output, values, group, async_op):
        others = dist.get_world_size(group) - 1
        self.bytes.append(("all-gather", others * values.numel() * values.element_size()))
        return self._all_gather(output, values, group=group, async_op=async_op)

    def patches(self):
        return (
            mock.patch.object(dist, "all_to_all_single", self.all_to_all),
            mock.patch.object(exchange, "_all_gather", self.all_gather),
        )


def shard(model: nn.Module, layout: Layout, **kwargs) -> nn.Module:
    state = create_groups(layout, torch.device("cpu"), 0, 60.0)
    blocks = dict(model.blocks.named_children())
    if "1" in blocks:
        experts = blocks["1"].moe.experts
        for name, param in list(experts.named_parameters()):
            spread = distribute_tensor(param.detach(), state.expert_mesh["ep"], [Shard(0)])
            experts.register_parameter(name, nn.Parameter(spread))
        fully_shard(experts, mesh=state.expert_mesh["expert_replicate", "efsdp"])
    return fully_shard(model, mesh=state.dense_mesh, **kwargs)


def train_sharded(replicate: int, ep: int, dtype_name: str, config: OptimizerConfig = CONFIG) -> dict:
    dtype = DTYPES[dtype_name]
    layout = make_layout(dist.get_world_size(), experts=EXPERTS, ep=ep, replicate=replicate)
    model = shard(new_model(dtype), layout)
    optimizer = build_optimizer(model, config)
    set_gradients(model, 1, dtype, layout)
    share = float(local_square_sum(optimizer.params.values()))
    meter, witness = Meter(), Witness()
    for patch in (patches := meter.patches()):
        patch.start()
    norms = train(model, optimizer, dtype, layout)
    for patch in patches:
        patch.stop()
    state, muon = optimizer.tensors(), optimizer.muon
    assert all(isinstance(t, DTensor) and not t.requires_grad for t in state.values())
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: SHAPES[parameter_of(n)] for n in state}
    result = {
        "share": share,
        "norms": norms,
        "weights": {n: p.detach().to_local().numpy().copy() for n, p in model.named_parameters()},
        "state": {n: t.to_local().numpy().copy() for n, t in state.items()},
        "summary": optimizer.summary(),
        "traffic": muon.traffic(),
        "sent": meter.bytes,
        "cut": [muon.params[i].name for i in muon._cut],
        "owned": [muon.params[muon._cut[i]].name for i in muon._exchange.owned] if muon._exchange else [],
    }
    with witness:
        clip_gradients(optimizer.params.values(), MAX_NORM, dist.group.WORLD)
        optimizer.step(LR)
    return result | {"dispatched": witness.seen}


def all_grids(world: int) -> dict:
    """{(replicate, ep, dtype): result of this rank}."""
    return {(*grid, dtype): train_sharded(*grid, dtype) for grid in GRIDS[world] for dtype in DTYPES}


def two_ranks() -> dict:
    """What needs no more than two ranks and one grid."""
    return {
        "traffic": small_example(),
        "errors": bad_input(),
        "bf16": train_sharded(1, 2, "float32", LOW_PRECISION),
    }


def small_example() -> dict:
    """Bytes a step with two matrices over two ranks, by replicas: cut into rows, and as copies."""
    names = ("blocks.0.attention.q.weight", "blocks.0.attention.k.weight")
    traffic = {}
    for replicate in (1, 2):
        layout = make_layout(2, experts=EXPERTS, replicate=replicate)
        optimizer = build_optimizer(shard(new_model(torch.float32, names), layout), CONFIG)
        traffic[replicate] = optimizer.muon.traffic()
    return traffic


def bad_input() -> list[str]:
    """Messages for a missing gradient and for matrices cut by columns."""
    layout = make_layout(2, experts=EXPERTS)
    model = shard(new_model(torch.float32), layout)
    optimizer = build_optimizer(model, CONFIG)
    set_gradients(model, 1, torch.float32, layout)
    model.blocks.get_submodule("1.moe.router").weight.grad = None
    messages = []
    with pytest.raises(ConfigError) as error:
        optimizer.step(LR)
    messages.append(str(error.value))
    names = ("blocks.0.attention.q.weight",)
    by_columns = shard(new_model(torch.float32, names), layout, shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(ConfigError) as error:
        build_optimizer(by_columns, CONFIG)
    return [*messages, str(error.value)]
