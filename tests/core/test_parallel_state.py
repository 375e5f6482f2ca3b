"""The layout of ranks against one that is derived otherwise, for every world up to 4096, and against real groups."""

from __future__ import annotations

import itertools
import re
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_nucleus.core.parallel_state import (
    DENSE_AXES,
    EXPERT_AXES,
    Layout,
    create_groups,
    explain_mesh,
    make_layout,
    single_process,
)
from megatron_nucleus.utils.errors import ConfigError
from tests.ranks import run_ranks

EXPERTS = 64
AXES = (*DENSE_AXES, *EXPERT_AXES)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


class Reference:
    """The same layout as arrays of ranks: reshaped, transposed, counted; no arithmetic on a single rank."""

    def __init__(self, world: int, ep: int, replicate: int, experts: int = EXPERTS):
        ranks = np.arange(world)
        self.dense = ranks.reshape(replicate, -1)
        spread = 1
        for size in divisors(experts // ep):
            if world % (ep * size) == 0 and self._stays_inside(ranks, ep, size):
                spread = size
        self.expert = ranks.reshape(-1, spread, ep)
        # One copy of the experts fills a block of spread x ep ranks, and blocks repeat.
        ids = np.arange(experts).reshape(ep, spread, -1)
        self._stored = ids.transpose(1, 0, 2).reshape(spread * ep, -1)
        self._computed = np.tile(ids.reshape(1, ep, -1), (spread, 1, 1)).reshape(spread * ep, -1)
        self.block = np.tile(np.arange(spread * ep), self.expert.shape[0])  # rank -> place in its block

    def stored(self, rank: int) -> list[int]:
        return self._stored[self.block[rank]].tolist()

    def computed(self, rank: int) -> list[int]:
        return self._computed[self.block[rank]].tolist()

    def _stays_inside(self, ranks: np.ndarray, ep: int, size: int) -> bool:
        """Whether ``size`` neighbouring ep groups can share experts: peers in them are of one shard group."""
        shard_group = np.repeat(np.arange(len(self.dense)), self.dense.shape[1])
        together = shard_group[ranks.reshape(-1, size, ep)]
        return bool((together == together[:, :1]).all())

    def grid(self, axis: str) -> tuple[np.ndarray, int]:
        return (
            (self.dense, DENSE_AXES.index(axis))
            if axis in DENSE_AXES
            else (self.expert, EXPERT_AXES.index(axis))
        )

    def groups(self, axis: str) -> np.ndarray:
        """One row for each group."""
        grid, dim = self.grid(axis)
        return np.moveaxis(grid, dim, -1).reshape(-1, grid.shape[dim])

    def coordinate(self, axis: str) -> np.ndarray:
        """By rank."""
        grid, dim = self.grid(axis)
        return np.indices(grid.shape)[dim].reshape(-1)


def check_sizes_and_coordinates(layout: Layout, reference: Reference) -> None:
    """All ranks at once: the methods that compute on a rank do so on an array of them."""
    world = layout.world
    assert layout.replicate * layout.shard == layout.expert_replicate * layout.efsdp * layout.ep == world
    assert (layout.expert_replicate, layout.efsdp, layout.ep) == reference.expert.shape
    found = layout.coordinates(np.arange(world))
    for axis in AXES:
        assert (found[axis] == reference.coordinate(axis)).all(), (layout, axis)


def check_ranks(layout: Layout, reference: Reference, ranks: range | list[int]) -> None:
    for rank in ranks:
        assert list(layout.experts_of(rank)) == reference.stored(rank)
        assert list(layout.experts_computed_by(rank)) == reference.computed(rank)
        assert set(layout.experts_of(rank)) <= set(layout.experts_computed_by(rank))
    for axis in AXES:
        rows = reference.groups(axis)
        for rank in ranks:
            group = layout.group(axis, rank)
            assert group == tuple(rows[(rows == rank).any(axis=1)][0].tolist())
            assert group[layout.coordinates(rank)[axis]] == rank


def check_groups(layout: Layout, reference: Reference) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert groups == [tuple(row) for row in reference.groups(axis).tolist()]
        assert sorted(itertools.chain(*groups)) == list(range(layout.world))
    assert all(group == tuple(range(group[0], group[0] + layout.ep)) for group in layout.groups("ep"))


def check_experts(layout: Layout, reference: Reference) -> None:
    """Every expert is stored by ``expert_replicate`` ranks, computed once in every ep group, and as often as any other.

    Where a rank is in its block decides its experts (`Reference`), so that one block stands for all.
    """
    size = layout.ep * layout.efsdp
    assert (np.bincount(reference.block) == [layout.expert_replicate] * size).all()
    everything = list(range(layout.experts))
    for rank in {0, layout.world - 1}:
        peers = layout.group("ep", rank)
        assert sorted(x for r in peers for x in layout.experts_computed_by(r)) == everything
        block = {r for peer in peers for r in layout.group("efsdp", peer)}
        assert len(block) == size
        assert sorted(x for r in block for x in layout.experts_of(r)) == everything


def check_every_expert(layout: Layout) -> None:
    """The same, counted over all ranks."""
    stored = np.bincount([x for r in range(layout.world) for x in layout.experts_of(r)])
    assert stored.tolist() == [layout.expert_replicate] * layout.experts
    for group in layout.groups("ep"):
        computed = [x for r in group for x in layout.experts_computed_by(r)]
        assert sorted(computed) == list(range(layout.experts))
    assert len({len(layout.experts_of(r)) for r in range(layout.world)}) == 1


def test_every_world_up_to_4096():
    rng = np.random.default_rng(0)
    for world in range(1, 4097):
        copies = divisors(world)
        other = copies[int(rng.integers(len(copies)))]
        for ep in [d for d in divisors(EXPERTS) if world % d == 0]:
            for replicate in {1, other}:
                layout = make_layout(world, experts=EXPERTS, ep=ep, replicate=replicate)
                reference = Reference(world, ep, replicate)
                check_sizes_and_coordinates(layout, reference)
                check_ranks(layout, reference, [world - 1, int(rng.integers(world))])
                check_experts(layout, reference)


@pytest.mark.parametrize(("experts", "largest"), [(EXPERTS, 128), (60, 40), (12, 40), (1, 20)])
def test_every_rank_and_group_of_small_worlds(experts, largest):
    for world in range(1, largest + 1):
        for ep in [d for d in divisors(experts) if world % d == 0]:
            for replicate in divisors(world):
                layout = make_layout(world, experts=experts, ep=ep, replicate=replicate)
                reference = Reference(world, ep, replicate, experts)
                check_sizes_and_coordinates(layout, reference)
                check_ranks(layout, reference, range(world))
                check_groups(layout, reference)
                check_experts(layout, reference)
                check_every_expert(layout)


@pytest.mark.parametrize("world", [*range(144, 257, 16), 512, 1024, 2048, 4096])
def test_every_number_of_copies_in_larger_worlds(world):
    for ep in divisors(EXPERTS):
        for replicate in divisors(world) if world % ep == 0 else []:
            layout = make_layout(world, experts=EXPERTS, ep=ep, replicate=replicate)
            reference = Reference(world, ep, replicate)
            check_sizes_and_coordinates(layout, reference)
            check_experts(layout, reference)
            check_ranks(layout, reference, [0, world // 2, world - 1])
            if world <= 512:
                check_groups(layout, reference)


def test_the_published_layout_and_the_recommended_one():
    published = make_layout(64, experts=64, ep=64)
    assert [list(published.experts_of(rank)) for rank in range(64)] == [[rank] for rank in range(64)]
    recommended = make_layout(64, experts=64, ep=8)
    assert (recommended.efsdp, recommended.expert_replicate) == (8, 1)
    assert list(recommended.experts_computed_by(17)) == list(range(8, 16))
    assert list(recommended.experts_of(17)) == [10]  # node 2 stores the third of each eight


def test_an_ep_group_beyond_the_shard_group_is_not_spread_further():
    layout = make_layout(12, experts=12, ep=4, replicate=2)
    assert (layout.shard, layout.efsdp, layout.expert_replicate) == (6, 1, 3)


EP, COPIES = "--expert-model-parallel-size", "--data-parallel-replicate-size"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 4, "ep": 3}, f"{EP} 3: must divide the 4 ranks and the 64 experts; allowed: 1, 2, 4"),
        ({"world": 6, "ep": 4}, f"{EP} 4: must divide the 6 ranks and the 64 experts; allowed: 1, 2"),
        (
            {"world": 96, "ep": 96},
            f"{EP} 96: must divide the 96 ranks and the 64 experts; allowed: 1, 2, 4, 8, 16, 32",
        ),
        ({"world": 4, "ep": 0}, f"{EP} 0: must divide the 4 ranks and the 64 experts; allowed: 1, 2, 4"),
        ({"world": 6, "replicate": 4}, f"{COPIES} 4: must divide the 6 ranks; allowed: 1, 2, 3, 6"),
        ({"world": 2, "replicate": 0}, f"{COPIES} 0: must divide the 2 ranks; allowed: 1, 2"),
    ],
)
def test_sizes_that_do_not_divide_name_those_that_do(sizes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make_layout(experts=EXPERTS, **sizes)


# What people read

GOLDEN = """\
4 ranks on 2 nodes of up to 2; 8 experts in every MoE layer

dense parameters: replicate 1 x shard 4
  a rank stores 1/4 of them; 1 copy in all
experts: expert_replicate 1 x efsdp 2 x ep 2
  a rank stores 2 of 8 and computes the 4 of its efsdp group; tokens for the others travel over ep; 1 copy in all

rank  node  stores experts  computes experts
   0     0             0-1               0-3
   1     0             4-5               4-7
   2     1             2-3               0-3
   3     1             6-7               4-7

shard: 1 group of 4 ranks, each over 2 nodes
  all-gather of dense weights, reduce-scatter of their gradients, exchange of Muon's matrices
  0-3

replicate: every rank alone, no traffic

ep: 2 groups of 2 ranks, each within a node
  all-to-all of tokens to their experts and back
  0,1
  2,3

efsdp: 2 groups of 2 ranks, each over 2 nodes
  all-gather of expert weights, reduce-scatter of their gradients
  0,2
  1,3

expert_replicate: every rank alone, no traffic"""


def test_the_explanation_of_a_small_world():
    assert explain_mesh(make_layout(4, experts=8, ep=2), gpus_per_node=2) == GOLDEN


def test_the_explanation_of_a_large_world_says_what_it_leaves_out():
    text = explain_mesh(make_layout(4096, experts=64, ep=8, replicate=64))
    lines = text.splitlines()
    assert len(lines) < 80
    assert "... 4079 more ranks ..." in lines
    assert "4095   511              63             56-63" in lines
    head = lines.index("ep: 512 groups of 8 ranks, each within a node")
    assert lines[head + 2 : head + 8] == [
        "  0-7",
        "  8-15",
        "  16-23",
        "  24-31",
        "  ... 507 more groups ...",
        "  4088-4095",
    ]
    assert "  0,8..56" in lines
    assert all(re.search("  node  |more", line) or len(line) < 120 for line in lines)


# Real groups


def groups_of_this_rank(ep: int, replicate: int) -> dict:
    layout = make_layout(dist.get_world_size(), experts=8, ep=ep, replicate=replicate)
    state = create_groups(layout, torch.device("cpu"), local_rank=dist.get_rank(), timeout_s=60.0)
    members = {axis: dist.get_process_group_ranks(state.dense_mesh[axis].get_group()) for axis in DENSE_AXES}
    members |= {
        axis: dist.get_process_group_ranks(state.expert_mesh[axis].get_group()) for axis in EXPERT_AXES
    }
    summed = {}
    for axis, mesh in [(a, state.dense_mesh) for a in DENSE_AXES] + [
        (a, state.expert_mesh) for a in EXPERT_AXES
    ]:
        value = torch.tensor([1 << state.rank])
        dist.all_reduce(value, group=mesh[axis].get_group())
        summed[axis] = int(value)
    return {
        "members": members, "summed": summed, "layout": layout, "rank": state.rank,
        "control": (dist.get_backend(state.control), dist.get_process_group_ranks(state.control)),
        "ep_group": state.ep_group and dist.get_process_group_ranks(state.ep_group),
        "experts_held": experts_held(state),
    }  # fmt: skip


def experts_held(state) -> list[int]:
    """The rows that this rank holds of an [8, 3] parameter sharded as the model's experts are."""
    layout = state.layout
    weight = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    module = torch.nn.Module()
    local = distribute_tensor(weight, state.expert_mesh["ep"], [Shard(0)])
    module.weight = torch.nn.Parameter(local)
    fully_shard(module, mesh=state.expert_mesh["expert_replicate", "efsdp"])
    assert isinstance(module.weight, DTensor)
    assert module.weight.shape == (8, 3)
    held = module.weight.to_local()
    assert (held == held[:, :1]).all()
    assert len(held) == 8 // (layout.ep * layout.efsdp)
    return held[:, 0].int().tolist()


@pytest.mark.parametrize(
    ("world", "ep", "replicate"), [(2, 1, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2), (4, 4, 1), (4, 1, 2)]
)
def test_groups_and_stored_rows_are_those_of_the_layout(tmp_path, world, ep, replicate):
    for rank, found in enumerate(run_ranks(world, groups_of_this_rank, tmp_path, ep, replicate)):
        layout = found["layout"]
        assert found["rank"] == rank
        for axis in AXES:
            assert found["members"][axis] == list(layout.group(axis, rank))
            assert found["summed"][axis] == sum(1 << r for r in layout.group(axis, rank))
        assert found["control"] == ("gloo", list(range(world)))
        assert found["ep_group"] == (None if ep == 1 else list(layout.group("ep", rank)))
        assert found["experts_held"] == list(layout.experts_of(rank))


def how_long_each_group_waits() -> dict[str, float]:
    layout = make_layout(4, experts=8, ep=2, replicate=2)
    state = create_groups(layout, torch.device("cpu"), local_rank=0, timeout_s=1.0)
    waited = {}
    groups = {"shard": state.dense_mesh["shard"].get_group(), "ep": state.ep_group, "control": state.control}
    for name, group in groups.items():
        if dist.get_group_rank(group, dist.get_rank()) == 0:
            began = time.monotonic()
            with pytest.raises(RuntimeError, match="[Tt]imed out"):
                dist.all_reduce(torch.ones(1), group=group)
            waited[name] = time.monotonic() - began
    time.sleep(4.0)  # until all have seen it: a rank that ends closes its connections
    return waited


def test_no_group_waits_longer_than_it_was_told(tmp_path):
    for rank, waited in enumerate(run_ranks(4, how_long_each_group_waits, tmp_path)):
        assert set(waited) == {0: {"shard", "ep", "control"}, 1: set(), 2: {"shard", "ep"}, 3: set()}[rank]
        assert all(0.9 < seconds < 10.0 for seconds in waited.values())


def a_layout_of_another_size() -> str:
    with pytest.raises(ValueError, match="the layout is for 4 ranks, the process group has 2"):
        create_groups(make_layout(4, experts=8), torch.device("cpu"), 0, 60.0)
    return "refused"


def test_a_layout_of_another_size_is_refused(tmp_path):
    assert run_ranks(2, a_layout_of_another_size, tmp_path) == ["refused"] * 2


def test_a_single_process_holds_everything_and_has_no_groups():
    state = single_process(torch.device("cpu"), experts=8)
    assert (state.rank, state.world, list(state.layout.experts_of(0))) == (0, 1, list(range(8)))
    assert (state.ep_group, state.control, state.dense_mesh, state.expert_mesh) == (None, None, None, None)
