"""What the launchers share: tile widths and argument checks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``; triton tiles have such widths."""
    return triton.next_power_of_2(max(1, n))


def check(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are contiguous and of one floating dtype that the kernels take."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        names = ", ".join(f"{name} {_dtype(t)}" for name, t in tensors.items())
        raise ValueError(f"{op} takes tensors of one dtype out of float32, bfloat16, float16; got {names}")
    check_launchable(op, **tensors)


def check_launchable(op: str, **tensors: Tensor) -> None:
    """What every launch needs of its tensors, whatever their dtypes.

    Raises:
        ValueError: one is not contiguous, or lies on another GPU than the current one.
        RuntimeError: under forward-mode differentiation, whose tangents a kernel would silently lose.
    """
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
        # Triton launches on the current GPU whatever the tensors lie on.
        if t.is_cuda and t.device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            raise ValueError(f"{op}: {name} lies on {t.device}, the current device is cuda:{current}")
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{op}: no forward-mode derivatives on Triton kernels; choose the torch backend")


def check_shape(op: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have ``shape``: a kernel would read and write beyond them."""
    for name, t in tensors.items():
        if t.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(t.shape)}")


def check_images(op: str, stream: dict[str, Tensor], per_image: dict[str, Tensor]) -> None:
    """`check` all; ``stream`` must be [B, S, D] alike, ``per_image`` [B, D]."""
    check(op, **stream, **per_image)
    name, first = next(iter(stream.items()))
    if first.dim() != 3:
        raise ValueError(f"{op}: {name} must be [B, S, D], got {list(first.shape)}")
    B, S, D = first.shape
    check_shape(op, (B, S, D), **stream)
    check_shape(op, (B, D), **per_image)


def check_matrix(op: str, name: str, stack: Tensor) -> None:
    """Raise ValueError where a matrix of ``stack`` [n, R, C] is too large for 32-bit offsets inside it."""
    values = stack.shape[-2] * stack.shape[-1]
    if values >= 2**31:
        raise ValueError(f"{op}: {name} has {values} values a matrix, its kernel takes fewer than 2^31")


def check_index(op: str, index: Tensor) -> None:
    """Raise ValueError unless ``index`` is [N], int64 and contiguous. Its values are not read: that would wait."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"{op}: index must be [N] in int64, got {list(index.shape)} in {_dtype(index)}")
    check_launchable(op, index=index)


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
