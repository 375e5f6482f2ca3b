"""A small model and optimizer over the ranks of a grid, whose every value is known without asking torch for offsets."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_nucleus.core.parallel_state import ParallelState, create_groups, make_layout, single_process
from megatron_nucleus.export import native
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.tensors import local

EXPERTS = 8
EXTRA = {"seed": 3, "data": {"manifest_hash": "abc"}}
# Rows that no number of ranks divides, fewer rows than ranks, one row, experts.
SHAPES = {
    "wide": (7, 5),
    "bias": (3,),
    "frozen": (1,),
    "experts.gate_up": (EXPERTS, 3, 4),
    "experts.down": (EXPERTS, 2, 3),
}


class Small(nn.Module):
    """Parameters of the names and shapes of `SHAPES`."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        for name, shape in SHAPES.items():
            module, _, last = name.rpartition(".")
            parameter = nn.Parameter(torch.zeros(shape), requires_grad=name != "frozen")
            setattr(self.get_submodule(module), last, parameter)


class Momentum:
    """What a checkpointer needs of an optimizer."""

    def __init__(self, model: nn.Module):
        self.state = {
            f"momentum.{name}": torch.zeros_like(p.detach()) for name, p in model.named_parameters()
        }
        self.updates = 0

    def tensors(self) -> dict[str, Tensor]:
        return self.state

    def scalars(self) -> dict:
        return {"updates": self.updates}

    def load_scalars(self, scalars: dict) -> None:
        self.updates = scalars["updates"]


def grid(ep: int = 1, replicate: int = 1) -> ParallelState:
    """This rank in the world that is there."""
    if not dist.is_initialized():
        return single_process(torch.device("cpu"), EXPERTS)
    layout = make_layout(dist.get_world_size(), experts=EXPERTS, ep=ep, replicate=replicate)
    return create_groups(layout, torch.device("cpu"), dist.get_rank(), timeout_s=60)


def build(ps: ParallelState) -> TrainState:
    """All zero, spread as `core/parallelize.py` does."""
    model = Small()
    if ps.world > 1:
        for name, parameter in list(model.experts.named_parameters()):
            spread = distribute_tensor(parameter.detach(), ps.expert_mesh["ep"], [Shard(0)])
            setattr(model.experts, name, nn.Parameter(spread))
        fully_shard(model.experts, mesh=ps.expert_mesh["expert_replicate", "efsdp"])
        fully_shard(model, mesh=ps.dense_mesh)
    return TrainState(model, Momentum(model))


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, live."""
    return {**state.model.state_dict(), **state.optimizer.tensors()}


def full_values(step: int) -> dict[str, Tensor]:
    """What the whole tensors hold at ``step``: random bits, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    shapes = {**SHAPES, **{f"momentum.{name}": shape for name, shape in SHAPES.items()}}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def own_rows(ps: ParallelState, name: str) -> Tensor:
    """Row numbers that this rank holds, by the grid's own rule."""
    rows = torch.arange(SHAPES[name.removeprefix("momentum.")][0])
    if ps.world == 1:
        return rows
    if ".gate_up" in name or ".down" in name:
        return torch.tensor(ps.layout.experts_of(ps.rank))
    pieces = rows.chunk(ps.layout.shard)
    shard = ps.layout.coordinates(ps.rank)["shard"]
    return pieces[shard] if shard < len(pieces) else rows[:0]


def fill(state: TrainState, ps: ParallelState, step: int) -> TrainState:
    """Give ``state`` the values, counters and scalars of ``step``."""
    with torch.no_grad():
        for name, value in full_values(step).items():
            local(tensors(state)[name]).copy_(value[own_rows(ps, name)])
    state.step, state.samples_seen, state.skipped = step, 16 * step, step % 3
    state.loss_average, state.optimizer.updates = 1.0 / (step + 3), 10 * step
    return state


def assert_holds(state: TrainState, ps: ParallelState, step: int) -> None:
    """Every bit of this rank's part is that of ``step``."""
    for name, value in full_values(step).items():
        mine = local(tensors(state)[name].detach())
        assert torch.equal(mine, value[own_rows(ps, name)]), (name, ps.rank)
    assert (state.step, state.samples_seen, state.skipped) == (step, 16 * step, step % 3)
    assert (state.loss_average, state.optimizer.updates) == (1.0 / (step + 3), 10 * step)


def assert_weights_stored(folder: Path, step: int) -> None:
    """A step folder is complete by its manifest, and every weight in it is that of ``step``."""
    native.verify(folder)
    store, expected = native.open_tensors(folder), full_values(step)
    assert set(store.names()) == set(SHAPES)
    assert all(torch.equal(store.read(name), expected[name]) for name in SHAPES)
