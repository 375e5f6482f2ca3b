"""Global gradient norm and clipping, on the device: nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nucleus.core.optimizer import shards
from megatron_nucleus.ops import grad_norm, registry


class ClipOps(NamedTuple):
    """Operations over all gradients at once: those of `ops.grad_norm` or of another backend."""

    square_sum: Callable[..., Tensor] = grad_norm.square_sum
    scale_: Callable[..., tuple[Tensor, ...]] = grad_norm.scale_


TORCH_OPS = ClipOps()
_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def resolve_clip(backend: str, params: Iterable[nn.Parameter]) -> ClipOps:
    """Operations for where the parameters are. A backend that only forms norms leaves the scaling to torch.

    Raises:
        ConfigError: the backend cannot serve them; the message says why and what can.
    """
    first = next(iter(params), None)
    if first is None:
        return ClipOps()
    place = {"device_type": first.device.type, "dtype": first.dtype}
    scales = {"auto", *(row.backend for row in registry.backends("scale_"))}
    return ClipOps(
        registry.resolve("square_sum", backend, **place),
        registry.resolve("scale_", backend if backend in scales else "torch", **place),
    )


class ClipReport(NamedTuple):
    """norm: global L2 norm before clipping, fp32 scalar tensor.

    finite: bool scalar tensor, False where the norm is NaN or infinite.
    """

    norm: Tensor
    finite: Tensor


@torch.no_grad()
def local_square_sum(params: Iterable[nn.Parameter], ops: ClipOps = TORCH_OPS) -> Tensor:
    """This rank's share of the squared gradient norm; the sum over all ranks is the square of the global norm.

    A shard that n ranks hold counts 1/n on each of them. Parameters without a gradient are left out; all are of one
    device.

    Returns:
        fp64 scalar tensor on the parameters' device; 0 without gradients.
    """
    params = list(params)
    by_copies: dict[int, list[Tensor]] = {}
    for grad in [p.grad for p in params]:
        if grad is not None:
            by_copies.setdefault(shards.copies(grad), []).append(grad)
    sums = [ops.square_sum(*shards.local(grads)) / copies for copies, grads in by_copies.items()]
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=params[0].device if params else None)
    return torch.stack(sums).sum()


@torch.no_grad()
def scale_gradients(
    params: Iterable[nn.Parameter], norm: Tensor | float, max_norm: float, ops: ClipOps = TORCH_OPS
) -> None:
    """Scale all gradients by min(1, max_norm/norm) in place.

    Args:
        params: parameters; those without a gradient are left out.
        norm: global norm, a scalar tensor on the gradients' device, or a number of the host: then gradients that need
            no scaling are not touched.
        max_norm: largest global norm; 0 leaves the gradients as they are.
    """
    grads = shards.local(p.grad for p in params if p.grad is not None)
    if not (max_norm > 0 and grads):
        return
    if isinstance(norm, float):
        if norm + _CLIP_EPS <= max_norm:
            return
        norm = torch.full((), norm, device=grads[0].device)
    ops.scale_((max_norm / (norm + _CLIP_EPS)).clamp_(max=1.0), *grads)


def clip_gradients(
    params: Iterable[nn.Parameter],
    max_norm: float,
    group: dist.ProcessGroup | None = None,
    ops: ClipOps = TORCH_OPS,
) -> ClipReport:
    """Measure the global norm and scale all gradients by min(1, max_norm/norm) in place.

    Args:
        params: parameters; those without a gradient are left out.
        max_norm: largest global norm; 0 measures without clipping.
        group: all ranks of the run, which add up 8 bytes each; None = this process has all gradients.

    Returns:
        The norm before clipping and whether it is finite. With a norm that is not finite the gradients are
        worthless afterwards: the caller skips the update.
    """
    params = list(params)
    square_sum = local_square_sum(params, ops)
    if group is not None:
        dist.all_reduce(square_sum, group=group)
    norm = square_sum.sqrt().float()
    scale_gradients(params, norm, max_norm, ops)
    return ClipReport(norm, torch.isfinite(norm))
