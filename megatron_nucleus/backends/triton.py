"""Operations as Triton kernels (triton_ops) for an NVIDIA GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from triton_ops import layer_norm, moe_rows


def why_unavailable(device_type: str) -> str | None:
    """Reason why the kernels cannot run on ``device_type``, or None."""
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "needs an NVIDIA GPU, none is visible"
    if not triton.knobs.runtime.interpret:
        return (
            f"needs an NVIDIA GPU (on {device_type} it runs only interpreted, TRITON_INTERPRET=1, for tests)"
        )
    return None


def gather_rows(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """`ops.moe_rows.gather_rows`."""
    return moe_rows.gather_rows(x_TD.contiguous(), index_N.contiguous())


def combine_rows(base_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, index_N: Tensor) -> Tensor:
    """`ops.moe_rows.combine_rows`."""
    dtype = base_TD.dtype
    rows_ND, weight_N = rows_ND.to(dtype).contiguous(), weight_N.to(dtype).contiguous()
    return moe_rows.combine_rows(base_TD.contiguous(), rows_ND, weight_N, index_N.contiguous())


def modulated_layer_norm(
    x_BSD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`ops.norm.modulated_layer_norm`."""
    scale_BD = scale_BD.to(x_BSD.dtype).contiguous()
    modulated_BSD, plain_BSD = layer_norm.modulated_layer_norm(x_BSD.contiguous(), scale_BD, eps, with_plain)
    return modulated_BSD, plain_BSD if with_plain else None
