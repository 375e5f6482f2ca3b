"""What the launchers share: tile widths and argument checks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``; triton tiles have such widths."""
    return triton.next_power_of_2(max(1, n))


def check(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are contiguous and of one floating dtype that the kernels take."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        names = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items())
        raise ValueError(f"{op} takes tensors of one dtype out of float32, bfloat16, float16; got {names}")
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
