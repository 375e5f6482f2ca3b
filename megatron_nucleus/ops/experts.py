"""The routed experts' feed-forward networks as batched matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nucleus.ops.swiglu import swiglu

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (5e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 3e-2),
    torch.float16: (4e-3, 4e-3),
}


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """``(silu(x @ gate) * (x @ up)) @ down`` for every expert at once.

    Args:
        rows_END: [E, N, D] rows of each expert; equal counts make this two batched products.
        gate_up_EDF2: [E, D, 2F], the gate half first. down_EFD: [E, F, D].

    Returns:
        [E, N, D] in the dtype of the inputs.
    """
    return torch.bmm(swiglu(torch.bmm(rows_END, gate_up_EDF2)), down_EFD)
