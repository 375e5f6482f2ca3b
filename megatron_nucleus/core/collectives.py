"""The exchanges between ranks that this code starts itself; those of FSDP are torch's.

A ``group`` of None means that this process is alone: nothing is sent. Bytes are counted at the call sites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.core.recompute import replaying

_functional = torch.ops._c10d_functional


class Traffic:
    """Bytes this rank hands to all-to-alls, its own share included, since the last `take`."""

    def __init__(self):
        self.bytes = 0

    def take(self) -> int:
        """The count so far; starts again at 0."""
        count, self.bytes = self.bytes, 0
        return count


class _Depart(torch.autograd.Function):
    """Start an equal-split all-to-all over dim 0; its result may be read only behind `_Arrive`.

    The two are each other's mirror: where the values depart in the forward pass, their gradient arrives.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group_name: str, ranks: int, traffic: Traffic) -> Tensor:
        return _start_all_to_all(x, group_name, ranks, traffic)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _functional.wait_tensor(grad), None, None, None


class _Arrive(torch.autograd.Function):
    """Wait for what `_Depart` started."""

    @staticmethod
    def forward(ctx, x: Tensor, group_name: str, ranks: int, traffic: Traffic) -> Tensor:
        ctx.route = (group_name, ranks, traffic)
        return _functional.wait_tensor(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _start_all_to_all(grad, *ctx.route), None, None, None


def depart(x: Tensor, group: dist.ProcessGroup | None, traffic: Traffic) -> Tensor:
    """Send block j of dim 0 to rank j of ``group`` and get block i of every rank i, without waiting for it.

    Args:
        x: [n * ranks, ...], the same shape on every rank. Bytes: all of x, of which 1/ranks stays here.

    Returns:
        a tensor of the same shape whose values are on their way: pass it to `arrive` before anything else.
    """
    return x if group is None else _Depart.apply(x, group.group_name, group.size(), traffic)


def arrive(x: Tensor, group: dist.ProcessGroup | None, traffic: Traffic) -> Tensor:
    """Wait for the values that `depart` sent. In the backward pass their gradients depart here."""
    return x if group is None else _Arrive.apply(x, group.group_name, group.size(), traffic)


def settle(x: Tensor) -> None:
    """Wait here for values on their way; `arrive` finds them there."""
    _functional.wait_tensor(x.detach())


def _start_all_to_all(x: Tensor, group_name: str, ranks: int, traffic: Traffic) -> Tensor:
    x = x.contiguous()
    if not torch.compiler.is_compiling() and not replaying():
        traffic.bytes += x.nbytes
    splits = [x.shape[0] // ranks] * ranks
    return _functional.all_to_all_single(x, splits, splits, group_name)


def gather_rows(row: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[k] on every rank -> [ranks, k], the same on all of them. Bytes: ``row`` to each other rank."""
    if group is None:
        return row.unsqueeze(0)
    rows = _functional.all_gather_into_tensor(row.contiguous(), group.size(), group.group_name)
    return _functional.wait_tensor(rows).view(group.size(), -1)


def on_first_rank(action: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """Call ``action`` on rank 0 of ``group`` alone; every rank returns its result or raises its error.

    The result must be picklable.
    """
    if group is None:
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class ShapeAgreement:
    """Raises on every rank where the ranks of an expert-parallel group come with different shapes.

    An equal-split all-to-all between different shapes would hang or mix up images. One message of three numbers
    per forward pass between hosts; nothing waits for the device.

    Args:
        group: gloo group of the ranks that exchange tokens.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def check(self, images: int, grid: tuple[int, int]) -> None:
        """Every rank of the group calls this before a forward pass.

        Raises:
            ValueError: naming the ranks and their shapes.
        """
        mine = torch.tensor([images, *grid], dtype=torch.int64)
        rows = gather_rows(mine, self.group).tolist()
        if any(row != rows[0] for row in rows):
            ranks = dist.get_process_group_ranks(self.group)
            by_shape: dict[tuple, list[int]] = {}
            for rank, row in zip(ranks, rows, strict=True):
                by_shape.setdefault(tuple(row), []).append(rank)
            found = "; ".join(
                f"ranks {', '.join(map(str, who))} have {B} images of {h} x {w} tokens"
                for (B, h, w), who in by_shape.items()
            )
            raise ValueError(
                f"the ranks of an expert-parallel group must bring the same shapes to a forward pass: {found}"
            )
