"""Operations as Triton kernels (triton_ops) for an NVIDIA GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_nucleus.ops.orthogonalize import coefficients, normalise
from megatron_nucleus.ops.registry import Request
from megatron_nucleus.ops.stochastic_round import check, halves, spans
from triton_ops import expert_ffn as experts
from triton_ops import gated_residual, layer_norm, moe_rows, symmetric, tuning
from triton_ops import norm_rope as rope
from triton_ops import stochastic_round as rounding
from triton_ops import swiglu as activation


def why_unavailable(device_type: str) -> str | None:
    """Reason why the kernels cannot run on ``device_type``, or None."""
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU, none is visible"
        return tuning.why_unusable(torch.device("cuda"))
    if not triton.knobs.runtime.interpret:
        return (
            f"needs an NVIDIA GPU (on {device_type} it runs only interpreted, TRITON_INTERPRET=1, for tests)"
        )
    return tuning.why_unusable(torch.device(device_type))


def why_unfit(request: Request) -> str | None:
    """Reason why a kernel cannot take a model's widths, or None: a row must fit one tile."""
    if request.sizes is None:
        return None
    widest = {
        "modulated_layer_norm": layer_norm.MAX_WIDTH,
        "gated_residual_norm": gated_residual.MAX_WIDTH,
    }.get(request.op)
    if widest is not None and request.sizes.width > widest:
        return f"takes rows of at most {widest} values, the model's have {request.sizes.width}"
    heads = request.sizes.head_width
    if request.op == "norm_rope" and (heads > rope.MAX_WIDTH or heads % 2):
        return f"takes heads of an even width up to {rope.MAX_WIDTH}, the model's have {heads}"
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


def gated_residual_norm(
    x_BSD: Tensor, branch_BSD: Tensor, gate_BD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`ops.norm.gated_residual_norm`."""
    tensors = (t.to(x_BSD.dtype).contiguous() for t in (x_BSD, branch_BSD, gate_BD, scale_BD))
    y_BSD, modulated_BSD, plain_BSD = gated_residual.gated_residual_norm(*tensors, eps, with_plain)
    return y_BSD, modulated_BSD, plain_BSD if with_plain else None


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, rotation_TK: Tensor, eps: float) -> Tensor:
    """`ops.norm_rope.norm_rope`."""
    turn = torch.view_as_real(rotation_TK.resolve_conj().contiguous())
    return rope.norm_rope(x_BTHK.contiguous(), weight_K.contiguous(), turn, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu.swiglu`."""
    width = gate_up.shape[-1]
    return activation.swiglu(gate_up.contiguous().view(-1, width)).view(*gate_up.shape[:-1], width // 2)


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """`ops.experts.expert_ffn`; torch's batched products, SwiGLU in one pass each way."""
    return experts.ExpertFFN.apply(*_alike(rows_END, gate_up_EDF2, down_EFD), False)


def expert_ffn_fused(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """`ops.experts.expert_ffn`; SwiGLU on the sums of the first product, before they leave the chip."""
    return experts.ExpertFFN.apply(*_alike(rows_END, gate_up_EDF2, down_EFD), True)


def orthogonalize(stack_nrc: Tensor, steps: int, overwrite: bool = False) -> Tensor:
    """`ops.orthogonalize.orthogonalize`."""
    return symmetric.newton_schulz(normalise(stack_nrc, overwrite), coefficients(steps))


def stochastic_round(values: Tensor, key: int, first: int = 0, out: Tensor | None = None) -> Tensor:
    """`ops.stochastic_round.stochastic_round`: the same bits."""
    check(values, first, out)
    values = values.float().contiguous()
    out = torch.empty_like(values, dtype=torch.int16) if out is None else out
    for low, high in spans(first, values.numel()) if values.numel() else ():
        part = slice(low - first, high - first)
        rounding.launch(values[part], out[part], low, *halves(key, low))
    return out


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, and in autocast's dtype where it is on, as it would cast them for torch's own product."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        tensors = tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
    return tuple(t.contiguous() for t in tensors)
