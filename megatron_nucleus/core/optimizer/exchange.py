"""Brings matrices that are cut by rows over ranks together at one owner each, and the owner's results back.

Muon needs whole matrices, FSDP cuts them: rank (r, s) of the mesh (replicate, shard) holds rows of block s of
every parameter, as copy r. Each parameter has one owner in the whole world, so that no matrix is orthogonalised
twice. One round trip, for the parameters whose owners are in one replica group:

    line    on every rank of the group: its rows of these parameters, ordered by owner
      | gather: all-to-all within the shard group
    inbox   on each owner: all rows of its own parameters, ordered by the rank that they come from
      | give_back: the same all-to-all mirrored; inbox and line are filled a second time, in the same order
    line    on every rank of the group: its rows of the results
      | replicate: all-gather within the replicate group, lines padded to the longest
    lines   on every rank: its rows of the results of all parameters

All sizes follow from the shapes: they are plain integers, the same on all ranks, agreed on without a word.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_nucleus.utils.errors import ConfigError

STAGES = ("gather", "return", "replicate")  # in which values go from rank to rank

# torch 2.13 renamed the function and warns at its old name, which is the only one in 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def assign_owners(costs: list[int], ranks: int) -> list[int]:
    """Spread work over ranks: the largest item first, each to the rank with the least so far.

    The result depends on nothing but the arguments (equal costs go in order, equal loads to the lower rank).
    No rank gets more than the mean plus the largest item.

    Args:
        costs: work of each item, any unit.

    Returns:
        The rank in [0, ranks) of each item.
    """
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owners[item] = loads[0]
        heapq.heapreplace(loads, (load + costs[item], owners[item]))
    return owners


def rows_of_block(rows: int, blocks: int, block: int) -> int:
    """Rows in ``block`` when ``rows`` are cut as `torch.chunk` does; the last blocks may be short or empty."""
    size = -(-rows // blocks)
    return max(0, min(size, rows - block * size))


class Exchange:
    """A round trip of all cut parameters: `gather`, `assemble`, `give_back`, `replicate`, `collect`.

    Every rank of the mesh calls all of them, in this order. Work between the calls overlaps with the transfers.

    Args:
        params: by name, DTensors [rows, columns] with placements (Replicate(), Shard(0)) on one mesh.
        costs: work for the owner of each, any unit.
        dtype: what travels, both ways.

    Attributes:
        sent: the parameters (positions in ``params``) that `gather` takes, in its order.
        owned: the parameters that this rank owns, in the order of `assemble` and `give_back`.

    Raises:
        ConfigError: a parameter that is spread in another way.
    """

    def __init__(self, params: dict[str, nn.Parameter], costs: list[int], dtype: torch.dtype):
        mesh = _common_mesh(params)
        self._shapes = [tuple(p.shape) for p in params.values()]
        self._dtype, self._device = dtype, next(iter(params.values())).device
        self._replicas, self._blocks = mesh.shape
        self._replica, self._block = mesh.get_coordinate()
        self._replicate_group, self._shard_group = mesh.get_group(0), mesh.get_group(1)

        owners = [divmod(owner, self._blocks) for owner in assign_owners(costs, mesh.size())]
        in_order = sorted(range(len(owners)), key=lambda i: owners[i])
        self._lines = [[i for i in in_order if owners[i][0] == r] for r in range(self._replicas)]
        self.sent = self._lines[self._replica]
        self.owned = [i for i in self.sent if owners[i][1] == self._block]

        blocks = range(self._blocks)
        self._line_sizes = [[self._values(i, self._block) for i in line] for line in self._lines]
        self._longest = max(sum(sizes) for sizes in self._line_sizes)
        self._line_splits = [
            sum(self._values(i, self._block) for i in self.sent if owners[i][1] == block) for block in blocks
        ]
        self._inbox_sizes = [self._values(i, block) for block in blocks for i in self.owned]
        self._inbox_splits = [sum(self._values(i, block) for i in self.owned) for block in blocks]
        self._line: Tensor | None = None  # buffers live for one round trip
        self._inbox: Tensor | None = None
        self._work: dist.Work | None = None

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sends to other ranks in each stage of one round trip."""
        gather = sum(self._line_splits) - self._line_splits[self._block]
        back = sum(self._inbox_splits) - self._inbox_splits[self._block]
        replicate = (self._replicas - 1) * self._longest
        values = zip(STAGES, (gather, back, replicate), strict=True)
        return {stage: count * self._dtype.itemsize for stage, count in values}

    def gather(self, tensors: list[Tensor]) -> None:
        """Start to bring the parameters ``sent`` to their owners.

        Args:
            tensors: [this rank's rows, columns] of each, any float dtype; free again on return.
        """
        self._line = torch.empty(self._longest, dtype=self._dtype, device=self._device)
        line = self._line[: sum(self._line_splits)]
        _copy(self._rows(self._line, self._replica), tensors)
        if self._blocks == 1:
            self._inbox = line  # the owner has all rows itself, in the inbox's order
            return
        self._inbox = line.new_empty(sum(self._inbox_splits))
        # Within one shard group: each rank sends every other one its rows of what that one owns.
        self._work = dist.all_to_all_single(
            self._inbox, line, self._inbox_splits, self._line_splits, group=self._shard_group, async_op=True
        )

    def assemble(self) -> list[Tensor]:
        """Wait for `gather`; returns [rows, columns] of every parameter ``owned``, in ``dtype``."""
        self._wait()
        pieces, count = self._inbox.split(self._inbox_sizes), len(self.owned)
        return [torch.cat(pieces[k::count]).view(self._shapes[i]) for k, i in enumerate(self.owned)]

    def give_back(self, results: list[Tensor]) -> None:
        """Start to send the rows of the results of ``owned``, [rows, columns] each, to the ranks that hold them."""
        pieces, count = self._inbox.split(self._inbox_sizes), len(self.owned)
        parts = [r.view(-1).split([p.numel() for p in pieces[k::count]]) for k, r in enumerate(results)]
        _copy(pieces, [part[block] for block in range(self._blocks) for part in parts])
        if self._blocks == 1:
            return
        # Within one shard group: each owner sends every other rank its rows of what it owns.
        line = self._line[: sum(self._line_splits)]
        self._work = dist.all_to_all_single(
            line, self._inbox, self._line_splits, self._inbox_splits, group=self._shard_group, async_op=True
        )

    def replicate(self) -> None:
        """Wait for `give_back` and start to pass the results on to the other replica groups."""
        self._wait()
        if self._replicas == 1:
            return
        lines = self._line.new_empty(self._replicas * self._longest)
        # Between the holders of the same rows: each rank sends its line to every other one.
        self._work = _all_gather(lines, self._line, group=self._replicate_group, async_op=True)
        self._line = lines

    def collect(self) -> list[Tensor]:
        """Wait for `replicate`; returns the result of every parameter, [this rank's rows, columns] in ``dtype``."""
        self._wait()
        by_parameter: dict[int, Tensor] = {}
        for replica, line in enumerate(self._line.view(self._replicas, self._longest)):
            by_parameter |= zip(self._lines[replica], self._rows(line, replica), strict=True)
        self._line = self._inbox = None
        return [by_parameter[i] for i in range(len(self._shapes))]

    def _values(self, i: int, block: int) -> int:
        """Values of parameter i in a block of rows."""
        rows, columns = self._shapes[i]
        return rows_of_block(rows, self._blocks, block) * columns

    def _rows(self, line: Tensor, replica: int) -> list[Tensor]:
        """The parts [this rank's rows, columns] of a line, for the parameters owned in a replica group."""
        sizes = self._line_sizes[replica]
        parts = zip(self._lines[replica], line[: sum(sizes)].split(sizes), strict=True)
        return [part.view(-1, self._shapes[i][1]) for i, part in parts]

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()  # on a GPU the stream waits, not the host
            self._work = None


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _common_mesh(params: dict[str, nn.Parameter]) -> DeviceMesh:
    mesh = next(iter(params.values())).device_mesh
    for name, param in params.items():
        known = param.device_mesh == mesh and mesh.ndim == 2
        if not (known and param.placements[0].is_replicate() and param.placements[1].is_shard(0)):
            raise ConfigError(
                f"optimizer: parameter '{name}' is spread as {param.placements} over {param.device_mesh}; Muon "
                "takes matrices cut by (Replicate(), Shard(0)), all over one mesh (replicate, shard)"
            )
    return mesh
