"""RMSNorm of every head and rotary positions, as queries and keys go through both."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nucleus.ops.norm import rms_norm

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-6, 1e-6),  # rotations are complex64 in every backend: sines are rounded to fp32
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 3e-2),
    torch.float16: (2e-3, 4e-3),
}


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, rotation_TK: Tensor, eps: float) -> Tensor:
    """`rms_norm` over K, then `rotate`.

    Args:
        x_BTHK: queries or keys, any floating dtype.
        weight_K: of the RMSNorm, shared by all heads.
        rotation_TK: [T, K/2] complex64 (`core/transformer/rope.py`); no gradient.
        eps: added to the mean square.

    Returns:
        [B, T, H, K] in the dtype that `rms_norm` gives. Source: diffusers' ``NucleusMoEAttnProcessor2_0``.
    """
    return rotate(rms_norm(x_BTHK, weight_K, eps), rotation_TK)


def rotate(x_BTHK: Tensor, rotation_TK: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of every head, in fp32 (fp64 for fp64); returns x's dtype.

    x_BTHK: [B, T, heads, K]. rotation_TK: [T, K/2] complex64.
    """
    wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.contiguous().unflatten(-1, (x_BTHK.shape[-1] // 2, 2)))
    return torch.view_as_real(pairs * rotation_TK[:, None]).flatten(3).type_as(x_BTHK)
