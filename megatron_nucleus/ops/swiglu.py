"""SwiGLU activation over one packed ``[gate, up]`` projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: [..., 2F], the gate half first (the one order inside this project), any floating dtype.

    Returns:
        [..., F] in the dtype of ``gate_up``.

    Raises:
        ValueError: an odd width.
    """
    if gate_up.shape[-1] % 2:  # halves of 2 and 1 would multiply by broadcasting
        raise ValueError(f"swiglu: gate_up must have an even width, has {gate_up.shape[-1]}")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
