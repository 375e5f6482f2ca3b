"""Normalisation: affine-free LayerNorm with adaptive scale, alone and behind a gated residual, and RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 3e-2),
    torch.float16: (2e-3, 4e-3),
}


def modulated_layer_norm(
    x_BSD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``LN(x) * (1 + scale)`` with one scale per image, and on request ``LN(x)`` itself.

    Args:
        x_BSD: tokens; statistics are taken over D in fp32 (fp64 for fp64).
        scale_BD: adaptive scale of each image, dtype of ``x_BSD``.
        eps: added to the variance.
        with_plain: also return the unmodulated ``LN(x)`` (the router judges it).

    Returns:
        ``(modulated_BSD, plain_BSD)`` in the dtype of ``x_BSD``; ``plain_BSD`` is None unless asked for.
        Source: the pre-norms of diffusers' ``NucleusMoEImageTransformerBlock``.
    """
    plain_BSD = F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=eps)
    modulated_BSD = plain_BSD * (1 + scale_BD.unsqueeze(1))
    return modulated_BSD, plain_BSD if with_plain else None


def gated_residual_norm(
    x_BSD: Tensor, branch_BSD: Tensor, gate_BD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A gated residual and the norm behind it: ``y = x + gate * branch``, then `modulated_layer_norm` of ``y``.

    Args:
        x_BSD: residual stream. branch_BSD: what is added to it, dtype of ``x_BSD``.
        gate_BD: gate of each image, as it is multiplied (bounded already). scale_BD, eps, with_plain: of
            `modulated_layer_norm`, which sees ``y`` as it is returned, rounded.

    Returns:
        ``(y_BSD, modulated_BSD, plain_BSD)`` in the dtype of ``x_BSD``; ``plain_BSD`` is None unless asked for.
    """
    y_BSD = torch.addcmul(x_BSD, gate_BD.unsqueeze(1), branch_BSD)
    return y_BSD, *modulated_layer_norm(y_BSD, scale_BD, eps, with_plain)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x: [..., D], any floating dtype; the mean square is taken in fp32 (fp64 for fp64).
        weight: [D]. A half-precision weight rounds the normalised ``x`` to its dtype before the product.
        eps: added to the mean square.

    Returns:
        [..., D] in the weight's dtype where that is half precision, else in the promoted dtype of both.
        Source: diffusers' ``RMSNorm``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    inverse_rms = torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    normalised = x * inverse_rms
    if weight.dtype in (torch.float16, torch.bfloat16):
        normalised = normalised.to(weight.dtype)
    return normalised * weight
