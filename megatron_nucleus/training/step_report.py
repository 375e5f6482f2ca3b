"""What the ranks tell each other at the end of a step: one message of a few numbers, read by all alike.

Every decision that all ranks must take together (apply or skip the update, stop) is a function of this table,
so no two ranks can decide differently.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.core.collectives import gather_rows


class StepLosses(NamedTuple):
    """Means over this rank's images of a step: fp32 scalar tensors, detached."""

    loss: Tensor
    flow_loss: Tensor
    router_z_loss: Tensor
    wavelet_loss: Tensor


class StepReport(NamedTuple):
    """One step of all ranks.

    loss and its parts: means over the global batch. grad_norm: global, before clipping.
    losses: every rank's loss. square_sums: every rank's part of the squared gradient norm.
    stopping: ranks that were asked to stop.
    """

    loss: float
    flow_loss: float
    router_z_loss: float
    wavelet_loss: float
    grad_norm: float
    losses: tuple[float, ...]
    square_sums: tuple[float, ...]
    stopping: tuple[int, ...]


def share_step(
    losses: StepLosses, square_sum: Tensor, stop: bool, group: dist.ProcessGroup | None
) -> StepReport:
    """Exchange the step's sums; the one place of a step where the host waits for the device.

    Args:
        square_sum: fp64 scalar, this rank's part of the squared gradient norm (`optimizer/clip.py`).
        stop: whether this rank was asked to stop.
        group: all ranks; None for a single process. Bytes: 48 to every other rank.
    """
    device = square_sum.device
    values = [x.to(device=device, dtype=torch.float64) for x in (square_sum, *losses)]
    row = torch.stack([*values, torch.full((), float(stop), dtype=torch.float64, device=device)])
    columns = list(zip(*gather_rows(row, group).tolist(), strict=True))
    square_sums, *parts, stops = columns
    means = [sum(column) / len(column) for column in parts]
    norm_square = sum(square_sums)
    grad_norm = math.sqrt(norm_square) if math.isfinite(norm_square) else norm_square
    stopping = tuple(rank for rank, flag in enumerate(stops) if flag)
    return StepReport(*means, grad_norm, parts[0], square_sums, stopping)
