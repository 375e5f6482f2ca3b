"""Turns the routers' rows apart, as a decoupled update of the weights.

Published (arXiv 2604.12163): a coefficient of 1e-7, applied to the weights directly like weight decay. The formula
is unknown; ours, for the rows w_i of one router (one row per expert), is

    penalty  = sum over pairs i < j of cos(w_i, w_j)^2
    gradient = 2 / |w_i| * sum over j != i of cos_ij * (u_j - cos_ij * u_i),   u = w / |w|
    w_i     -= eta * coefficient * gradient,                                   eta = lr of the step / peak lr

Why the cosine: experts that score the same direction take the same tokens, however long their rows are. The
gradient stands at right angles to its row, so it turns the row and to first order keeps its length: weight decay
and this do not work against each other. Why eta: it is the schedule's multiplier of the decoupled form (arXiv
1711.05101). Times the rate itself, a step would have 1e-4 * 1e-7, which changes no fp32 weight.

A row of length L turns by at most eta * coefficient * (experts - 1) / L^2 radians a step: 6e-6 for the published
numbers and L = 1, gently over a long run. What is below half of fp32's spacing is lost in the weight: of random rows
(64 of 4096 values, mean |cos| 0.012) 70 % of the update arrives at L = 1 and 11 % at L = 3; of rows that share a
direction (mean |cos| 0.5) all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nucleus.core.optimizer import shards
from megatron_nucleus.core.optimizer.exchange import rows_of_block
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.tensors import is_sharded

_functional = torch.ops._c10d_functional


class _Blocks(NamedTuple):
    """How the rows are cut over ranks. group_name: None where this rank holds all rows."""

    count: int
    mine: int
    group_name: str | None


class RouterOrthogonality:
    """The update for all routers of a model; every rank of their mesh calls `start` and `finish` together.

    Args:
        routers: by name, [experts, features] each and all alike, fp32 or fp64; whole, or DTensors cut into rows.
            Of bf16 parameters the fp32 copies that the optimizer keeps.
        coefficient: above 0.
        peak_lr: learning rate at which eta is 1, above 0.

    Raises:
        ConfigError: routers of different shapes, or one that is not cut into blocks of rows.
    """

    def __init__(self, routers: dict[str, Tensor], coefficient: float, peak_lr: float):
        self.coefficient, self.peak_lr = coefficient, peak_lr
        self.routers = list(routers.values())
        self._blocks = _common_blocks(routers)
        self._experts, self._features = self.routers[0].shape
        self._rows = rows_of_block(self._experts, self._blocks.count, 0)  # of the longest block
        self._travelling: Tensor | None = None

    def traffic(self) -> int:
        """Bytes that this rank sends to other ranks per step: its rows of every router to each other one."""
        values = len(self.routers) * self._rows * self._features
        return (self._blocks.count - 1) * values * self.routers[0].element_size()

    @torch.no_grad()
    def start(self) -> None:
        """Send this rank's rows as they are now to the ranks that hold the others: one message for all routers."""
        if self._blocks.group_name is None:
            return
        parts = shards.local(self.routers)
        line = parts[0].new_zeros(len(parts), self._rows, self._features)  # short blocks are padded
        for row, part in zip(line, parts, strict=True):
            row[: len(part)].copy_(part)
        # Within one shard group: each rank sends its rows of all routers to every other one. Bytes: `traffic`.
        self._travelling = _functional.all_gather_into_tensor(
            line, self._blocks.count, self._blocks.group_name
        )

    @torch.no_grad()
    def finish(self, lr: float) -> None:
        """Turn this rank's rows, away from all rows as they were at `start`.

        Memory, for a moment: all routers twice (29 MiB each time for the published model) and thrice its own rows.

        Args:
            lr: learning rate of the step, of which eta follows.
        """
        mine = shards.local(self.routers)
        own, first = len(mine[0]), self._blocks.mine * self._rows
        rows_REF = self._collect()
        if not own:
            return
        gradient = penalty_gradient(rows_REF, first, own)
        torch._foreach_add_(mine, list(gradient.unbind()), alpha=-self.coefficient * lr / self.peak_lr)

    def _collect(self) -> Tensor:
        """Every row of every router: [routers, experts, features]."""
        if self._blocks.group_name is None:
            return torch.stack(shards.local(self.routers))
        gathered, self._travelling = _functional.wait_tensor(self._travelling), None
        # Only the last blocks are short, so that all padding ends up behind the last expert.
        by_block = gathered.view(self._blocks.count, len(self.routers), self._rows, self._features)
        return by_block.movedim(0, 1).flatten(1, 2)[:, : self._experts]


def penalty_gradient(rows_REF: Tensor, first: int, count: int) -> Tensor:
    """Gradient of every router's penalty (see the module) in the rows ``first`` to ``first + count``.

    A row of zeros has no direction: its cosine with anything counts as 0, and so does its gradient.

    Args:
        rows_REF: [routers, experts, features], all rows.

    Returns:
        [routers, count, features] of the same dtype.
    """
    length = torch.linalg.vector_norm(rows_REF, dim=2, keepdim=True)
    inverse = torch.where(length > 0, 1 / length, 0.0)
    unit_REF = rows_REF * inverse
    own = slice(first, first + count)
    cosine_RoE = unit_REF[:, own] @ unit_REF.mT
    cosine_RoE.diagonal(offset=first, dim1=1, dim2=2).zero_()  # of a row with itself
    along = cosine_RoE.square().sum(2, keepdim=True)
    return (cosine_RoE @ unit_REF).addcmul_(along, unit_REF[:, own], value=-1).mul_(2 * inverse[:, own])


def _common_blocks(routers: dict[str, Tensor]) -> _Blocks:
    (first_name, first), *_ = routers.items()
    for name, router in routers.items():
        if (router.shape, _spread(router)) != (first.shape, _spread(first)):
            raise ConfigError(
                f"optimizer.router_orthogonality: '{name}' is {list(router.shape)}, {_spread(router)}, but "
                f"'{first_name}' is {list(first.shape)}, {_spread(first)}; it takes routers that are alike; 0 turns "
                "it off"
            )
    if not is_sharded(first):
        return _Blocks(1, 0, None)
    cut = [axis for axis, p in enumerate(first.placements) if not p.is_replicate()]
    if len(cut) != 1 or not first.placements[cut[0]].is_shard(0):
        raise ConfigError(
            f"optimizer.router_orthogonality: '{first_name}' is spread as {first.placements}; it takes routers cut "
            "into rows over one axis of the mesh; 0 turns it off"
        )
    mesh, axis = first.device_mesh, cut[0]
    count = mesh.size(axis)
    return _Blocks(count, mesh.get_local_rank(axis), mesh.get_group(axis).group_name if count > 1 else None)


def _spread(router: Tensor) -> tuple:
    return (router.device_mesh, router.placements) if is_sharded(router) else ("on one rank",)
