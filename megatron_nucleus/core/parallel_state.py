"""Which rank holds what: every process group of a run, cut from one grid of ranks.

The ranks 0..W-1 stand in one line, node by node, and are factorised twice:

    dense parameters   replicate x shard                   rank = r*shard + s
    experts            expert_replicate x efsdp x ep       rank = (er*efsdp + f)*ep + e

``shard`` ranks share one copy of the dense parameters (FSDP); ``replicate`` such groups hold copies (HSDP).
``ep`` neighbouring ranks share one set of experts and exchange tokens, so that a node's fast links carry the
all-to-all. The ranks beyond one ``ep`` group spread its experts further over ``efsdp`` ranks, whole matrices
each, as far as experts and shard group allow; what is left holds copies (``expert_replicate``).
Every rank is a data-parallel rank: it trains on its own images.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

DENSE_AXES = ("replicate", "shard")
EXPERT_AXES = ("expert_replicate", "efsdp", "ep")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    expert_model_parallel_size: int = knob(
        1,
        "ranks that share one set of experts and exchange tokens (EP); divides ranks and experts",
        unit="ranks",
    )
    data_parallel_replicate_size: int = knob(
        1,
        "copies of the dense parameters: 1 = FSDP over all ranks, as many as ranks = plain copies, else HSDP",
    )
    reshard_after_forward: bool = knob(
        True, "free gathered weights between forward and backward: less memory, one more all-gather"
    )
    recompute_granularity: str = knob(
        "none",
        "activation checkpointing: selective = recompute all but matrix products and attention, full = each "
        "block; router choices and all-to-alls are never repeated",
        choices=("none", "selective", "full"),
    )
    compile_blocks: bool = knob(False, "torch.compile every transformer block")
    moe_token_dispatcher_type: str = knob(
        "alltoall",
        "what carries tokens to their experts: alltoall = equal splits over NCCL or gloo; deepep and hybridep = "
        "DeepEP's ElasticBuffer or Buffer, and its HybridEPBuffer (bf16 on SM90 or newer; never run by this project)",
        choices=("alltoall", "deepep", "hybridep"),
    )
    moe_overlap_chunks: int = knob(
        1,
        "parts of a micro-batch whose all-to-all overlaps with the experts' work; 1 = no overlap",
        unit="chunks",
    )
    moe_shared_expert_overlap: bool = knob(True, "let the all-to-all run while the shared expert computes")
    distributed_timeout_minutes: float = knob(
        10.0, "end the run when a rank has not arrived at a collective for so long", unit="minutes"
    )

    def __post_init__(self) -> None:
        for name in ("expert_model_parallel_size", "data_parallel_replicate_size", "moe_overlap_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.moe_token_dispatcher_type != "alltoall" and self.expert_model_parallel_size == 1:
            raise ConfigError(
                f"--moe-token-dispatcher-type {self.moe_token_dispatcher_type}: no token leaves its rank with "
                "--expert-model-parallel-size 1; use alltoall, or more ranks"
            )
        if not self.distributed_timeout_minutes > 0:
            raise ConfigError(
                f"--distributed-timeout-minutes {self.distributed_timeout_minutes}: must be above 0"
            )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Pure integers: the grid of a world, without any process group. Use `make_layout`."""

    world: int
    experts: int
    replicate: int
    shard: int
    expert_replicate: int
    efsdp: int
    ep: int

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of ``rank`` on every axis of `DENSE_AXES` and `EXPERT_AXES`."""
        return {
            "replicate": rank // self.shard,
            "shard": rank % self.shard,
            "expert_replicate": rank // (self.efsdp * self.ep),
            "efsdp": rank // self.ep % self.efsdp,
            "ep": rank % self.ep,
        }

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on ``axis`` alone, in order of that axis; ``rank`` is one of them."""
        stride = {
            "replicate": self.shard,
            "shard": 1,
            "expert_replicate": self.efsdp * self.ep,
            "efsdp": self.ep,
            "ep": 1,
        }[axis]
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(range(first, first + getattr(self, axis) * stride, stride))

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of an axis, by first rank: a partition of the world."""
        firsts = [rank for rank in range(self.world) if self.coordinates(rank)[axis] == 0]
        return [self.group(axis, rank) for rank in firsts]

    def experts_of(self, rank: int) -> range:
        """The experts whose weights, gradients and optimizer state ``rank`` stores."""
        at = self.coordinates(rank)
        stored = self.experts // (self.ep * self.efsdp)
        first = (at["ep"] * self.efsdp + at["efsdp"]) * stored
        return range(first, first + stored)

    def experts_computed_by(self, rank: int) -> range:
        """The experts that ``rank`` computes for its ``ep`` group: its own, gathered over ``efsdp``."""
        computed = self.experts // self.ep
        first = self.coordinates(rank)["ep"] * computed
        return range(first, first + computed)


def make_layout(world: int, *, experts: int, ep: int = 1, replicate: int = 1) -> Layout:
    """Factorise ``world`` ranks.

    Args:
        world: number of ranks.
        experts: E, experts of one MoE layer.
        ep: ranks that share one set of experts; divides ``world`` and ``experts``.
        replicate: copies of the dense parameters; divides ``world``.

    Raises:
        ConfigError: a size that does not divide, naming the sizes that do.
    """
    if ep < 1 or world % ep or experts % ep:
        allowed = [d for d in range(1, min(world, experts) + 1) if world % d == 0 and experts % d == 0]
        raise ConfigError(
            f"--expert-model-parallel-size {ep}: must divide the {world} ranks and the {experts} experts; "
            f"allowed: {', '.join(map(str, allowed))}"
        )
    if replicate < 1 or world % replicate:
        allowed = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            f"--data-parallel-replicate-size {replicate}: must divide the {world} ranks; "
            f"allowed: {', '.join(map(str, allowed))}"
        )
    shard = world // replicate
    # Ranks of one shard group that hold the same experts spread them, in equal numbers of whole experts. Where ep
    # groups reach beyond a shard group, no number of them fills it.
    efsdp = math.gcd(shard // ep, experts // ep) if shard % ep == 0 else 1
    return Layout(world, experts, replicate, shard, world // (ep * efsdp), efsdp, ep)


@dataclasses.dataclass(frozen=True)
class ParallelState:
    """This process among the ranks of a run, and the groups it belongs to.

    Attributes:
        rank, world: position among all ranks. local_rank: position on this node, which is the GPU's number.
        layout: the grid. device: what this rank computes on.
        dense_mesh: axes `DENSE_AXES`. expert_mesh: axes `EXPERT_AXES`. Both None for a single process.
        control: gloo group over all ranks for small messages between hosts; None for a single process.
    """

    rank: int
    world: int
    local_rank: int
    layout: Layout
    device: torch.device
    dense_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """The ranks this one exchanges tokens with; None where it holds all experts."""
        return None if self.layout.ep == 1 else self.expert_mesh["ep"].get_group()


def single_process(device: torch.device, experts: int) -> ParallelState:
    """One rank that holds everything; no process group."""
    return ParallelState(0, 1, 0, make_layout(1, experts=experts), device)


def create_groups(layout: Layout, device: torch.device, local_rank: int, timeout_s: float) -> ParallelState:
    """Cut the groups of ``layout`` from the default process group, which must be initialised. Every rank calls this.

    Args:
        timeout_s: how long a collective waits for the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != layout.world:
        raise ValueError(f"the layout is for {layout.world} ranks, the process group has {world}")
    timeout = datetime.timedelta(seconds=timeout_s)
    dense = init_device_mesh(device.type, (layout.replicate, layout.shard), mesh_dim_names=DENSE_AXES)
    sizes = tuple(getattr(layout, axis) for axis in EXPERT_AXES)
    expert = init_device_mesh(device.type, sizes, mesh_dim_names=EXPERT_AXES)
    for mesh, axes in ((dense, DENSE_AXES), (expert, EXPERT_AXES)):
        for axis in axes:
            # A mesh takes no timeout; torch's own for new groups is 10 (NCCL) or 30 (gloo) minutes.
            dist.distributed_c10d._set_pg_timeout(timeout, mesh[axis].get_group())
    control = dist.new_group(backend="gloo", timeout=timeout)
    return ParallelState(rank, world, local_rank, layout, device, dense, expert, control)


def explain_mesh(layout: Layout, gpus_per_node: int = 8) -> str:
    """Text for people: the grid, which rank stores and computes which experts, and who talks to whom about what.

    Of many ranks or groups the first few and the last are shown, with the number of those left out.
    """
    nodes = -(-layout.world // gpus_per_node)
    rows = [_row(layout, rank, gpus_per_node) for rank in range(layout.world)]
    lines = [
        f"{_count(layout.world, 'rank')} on {_count(nodes, 'node')} of up to {gpus_per_node}; "
        f"{_count(layout.experts, 'expert')} in every MoE layer",
        "",
        f"dense parameters: replicate {layout.replicate} x shard {layout.shard}",
        f"  a rank stores {'all' if layout.shard == 1 else f'1/{layout.shard}'} of them; "
        f"{_count(layout.replicate, 'copy')} in all",
        f"experts: expert_replicate {layout.expert_replicate} x efsdp {layout.efsdp} x ep {layout.ep}",
        f"  a rank {_explain_experts(layout)}; {_count(layout.expert_replicate, 'copy')} in all",
        "",
        "rank  node  stores experts  computes experts",
        *_shorten(rows, 2 * gpus_per_node, "ranks"),
    ]
    for axis, purpose in _PURPOSES.items():
        lines += ["", *_explain_axis(layout, axis, purpose, gpus_per_node)]
    return "\n".join(lines)


_PURPOSES = {
    "shard": "all-gather of dense weights, reduce-scatter of their gradients, exchange of Muon's matrices",
    "replicate": "all-reduce of dense gradients, all-gather of Muon's updates",
    "ep": "all-to-all of tokens to their experts and back",
    "efsdp": "all-gather of expert weights, reduce-scatter of their gradients",
    "expert_replicate": "all-reduce of expert gradients",
}


def _explain_experts(layout: Layout) -> str:
    stored, computed = len(layout.experts_of(0)), len(layout.experts_computed_by(0))
    text = f"stores and computes {stored} of {layout.experts}"
    if stored != computed:
        text = f"stores {stored} of {layout.experts} and computes the {computed} of its efsdp group"
    return text if layout.ep == 1 else f"{text}; tokens for the others travel over ep"


def _row(layout: Layout, rank: int, gpus_per_node: int) -> str:
    stored, computed = (_span(r) for r in (layout.experts_of(rank), layout.experts_computed_by(rank)))
    return f"{rank:>4}  {rank // gpus_per_node:>4}  {stored:>14}  {computed:>16}"


def _explain_axis(layout: Layout, axis: str, purpose: str, gpus_per_node: int) -> list[str]:
    size = getattr(layout, axis)
    if size == 1:
        return [f"{axis}: every rank alone, no traffic"]
    groups = layout.groups(axis)
    spans = {len({rank // gpus_per_node for rank in group}) for group in groups}
    where = (
        "within a node"
        if spans == {1}
        else f"over {'-'.join(str(n) for n in sorted({min(spans), max(spans)}))} nodes"
    )
    head = f"{axis}: {_count(len(groups), 'group')} of {size} ranks, each {where}"
    return [head, f"  {purpose}", *_shorten([f"  {_ranks(group)}" for group in groups], 4, "groups", "  ")]


def _shorten(lines: list[str], most: int, what: str, indent: str = "") -> list[str]:
    left_out = len(lines) - most - 1
    if left_out < 2:  # a line that says so is no shorter
        return lines
    return [*lines[:most], f"{indent}... {left_out} more {what} ...", lines[-1]]


def _count(number: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def _span(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _ranks(group: tuple[int, ...]) -> str:
    """``0-7`` or ``0,8..56`` for a constant stride, all numbers where they are few."""
    steps = {b - a for a, b in itertools.pairwise(group)}
    if len(group) < 4 or len(steps) > 1:
        return ",".join(map(str, group))
    return f"{group[0]}-{group[-1]}" if steps == {1} else f"{group[0]},{group[1]}..{group[-1]}"
