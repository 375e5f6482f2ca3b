"""Global gradient norm and clipping, on the device: nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ClipReport(NamedTuple):
    """norm: global L2 norm before clipping, fp32 scalar tensor.

    finite: bool scalar tensor, False where the norm is NaN or infinite.
    """

    norm: Tensor
    finite: Tensor


@torch.no_grad()
def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all values of all tensors; an fp32 scalar tensor on the first one's device.

    An empty list has norm 0. The CPU kernel adds one value after the other, which in fp32 loses 4e-4 at 1e6
    equal values, so it accumulates in fp64; the GPU's tree sums stay in fp32.
    """
    if not tensors:
        return torch.zeros(())
    accumulate = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=accumulate)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])).float()


@torch.no_grad()
def clip_gradients(params: Iterable[nn.Parameter], max_norm: float) -> ClipReport:
    """Scale all gradients by min(1, max_norm/norm) in place.

    Args:
        params: parameters; those without a gradient are left out.
        max_norm: largest global norm; 0 measures without clipping.

    Returns:
        The norm before clipping and whether it is finite. With a norm that is not finite the gradients are
        worthless afterwards: the caller skips the update.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = global_norm(grads)
    if max_norm > 0 and grads:
        factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)  # 1e-6: as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(grads, factor)
    return ClipReport(norm, torch.isfinite(norm))
