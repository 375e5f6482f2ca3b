"""Operations in C++ for a CPU (csrc): one pass over the data where torch takes several."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

import megatron_nucleus._C  # noqa: F401  registers torch.ops.megatron_nucleus.*

_ops = torch.ops.megatron_nucleus


def refuse_forward_mode(op: str) -> None:
    """Refuse forward-mode differentiation: torch would run the operation on the values alone, with a tangent of 0."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{op}: the extension has no forward-mode derivatives; choose the torch backend")


def combine_rows(base_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, index_N: Tensor) -> Tensor:
    """`ops.moe_rows.combine_rows`."""
    refuse_forward_mode("combine_rows")
    dtype = base_TD.dtype
    rows_ND, weight_N = rows_ND.to(dtype).contiguous(), weight_N.to(dtype).contiguous()
    return _ops.combine_rows(base_TD.contiguous(), rows_ND, weight_N, index_N.contiguous())


def modulated_layer_norm(
    x_BSD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`ops.norm.modulated_layer_norm`."""
    refuse_forward_mode("modulated_layer_norm")
    scale_BD = scale_BD.to(x_BSD.dtype).contiguous()
    modulated_BSD, plain_BSD = _ops.modulated_layer_norm(x_BSD.contiguous(), scale_BD, eps, with_plain)
    return modulated_BSD, plain_BSD if with_plain else None


def gated_residual_norm(
    x_BSD: Tensor, branch_BSD: Tensor, gate_BD: Tensor, scale_BD: Tensor, eps: float, with_plain: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`ops.norm.gated_residual_norm`."""
    refuse_forward_mode("gated_residual_norm")
    tensors = (t.to(x_BSD.dtype).contiguous() for t in (x_BSD, branch_BSD, gate_BD, scale_BD))
    y_BSD, modulated_BSD, plain_BSD = _ops.gated_residual_norm(*tensors, eps, with_plain)
    return y_BSD, modulated_BSD, plain_BSD if with_plain else None


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, rotation_TK: Tensor, eps: float) -> Tensor:
    """`ops.norm_rope.norm_rope`."""
    refuse_forward_mode("norm_rope")
    x_BTHK, weight_K = _alike(x_BTHK, weight_K)
    turn = torch.view_as_real(rotation_TK.resolve_conj()).contiguous()
    return _ops.norm_rope(x_BTHK, weight_K, turn, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.norm.rms_norm`."""
    refuse_forward_mode("rms_norm")
    x, weight = _alike(x, weight)
    return _ops.rms_norm(x.view(-1, x.shape[-1]), weight, eps).view_as(x)


def _alike(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and in the dtype of the reference's result: a half-precision weight's, else the wider one."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    dtype = weight.dtype if half else torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype).contiguous(), weight.to(dtype).contiguous()


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu.swiglu`."""
    refuse_forward_mode("swiglu")
    width = gate_up.shape[-1]
    return _ops.swiglu(gate_up.contiguous().view(-1, width)).view(*gate_up.shape[:-1], width // 2)


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """`ops.experts.expert_ffn`."""
    return torch.bmm(swiglu(torch.bmm(rows_END, gate_up_EDF2)), down_EFD)


def square_sum(*tensors: Tensor) -> Tensor:
    """`ops.grad_norm.square_sum`."""
    return _ops.square_sum([t.detach().contiguous() for t in tensors])


def _combine_backward(ctx, grad_TD: Tensor):
    rows_ND, weight_N, index_N = ctx.saved_tensors
    grad_rows, grad_weight = _ops.combine_rows_backward(grad_TD.contiguous(), rows_ND, weight_N, index_N)
    return grad_TD, grad_rows, grad_weight, None


def _combine_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _modulated_backward(ctx, grad_BSD: Tensor, grad_plain_BSD: Tensor):
    x_BSD, scale_BD = ctx.saved_tensors
    plain = grad_plain_BSD.contiguous() if ctx.with_plain else None
    grads = _ops.modulated_layer_norm_backward(grad_BSD.contiguous(), plain, x_BSD, scale_BD, ctx.eps)
    return *grads, None, None


def _modulated_save(ctx, inputs, output) -> None:
    x_BSD, scale_BD, ctx.eps, ctx.with_plain = inputs
    ctx.save_for_backward(x_BSD, scale_BD)


def _gated_backward(ctx, grad_y: Tensor, grad: Tensor, grad_plain: Tensor):
    y, *saved = ctx.saved_tensors
    plain = grad_plain.contiguous() if ctx.with_plain else None
    grads = _ops.gated_residual_norm_backward(
        grad_y.contiguous(), grad.contiguous(), plain, y, *saved, ctx.eps
    )
    return *grads, None, None


def _gated_save(ctx, inputs, output) -> None:
    _, branch, gate, scale, ctx.eps, ctx.with_plain = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)


def _norm_rope_backward(ctx, grad: Tensor):
    return *_ops.norm_rope_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None, None


def _norm_rope_save(ctx, inputs, output) -> None:
    *saved, ctx.eps = inputs
    ctx.save_for_backward(*saved)


def _rms_backward(ctx, grad_ND: Tensor):
    x_ND, weight_D = ctx.saved_tensors
    return *_ops.rms_norm_backward(grad_ND.contiguous(), x_ND, weight_D, ctx.eps), None


def _rms_save(ctx, inputs, output) -> None:
    x_ND, weight_D, ctx.eps = inputs
    ctx.save_for_backward(x_ND, weight_D)


def _swiglu_backward(ctx, grad_NF: Tensor):
    return _ops.swiglu_backward(grad_NF.contiguous(), ctx.saved_tensors[0])


def _swiglu_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def no_second_derivative(ctx, *_):
    """Without this torch would take the gradients for constants, and a penalty on them would have no gradient."""
    raise RuntimeError("the extension has no second derivatives; choose the torch backend")


def _register() -> None:
    """Tell torch the shapes (for meta tensors and torch.compile) and the gradients of the C++ operations."""
    like = torch.empty_like
    shapes = {
        "combine_rows": lambda base, rows, weight, index: like(base),
        "combine_rows_backward": lambda grad, rows, weight, index: (like(rows), like(weight)),
        "modulated_layer_norm": lambda x, scale, eps, plain: (like(x), like(x) if plain else x.new_empty(0)),
        "modulated_layer_norm_backward": lambda grad, plain, x, scale, eps: (like(x), like(scale)),
        "gated_residual_norm": lambda x, branch, gate, scale, eps, plain: (
            like(x),
            like(x),
            like(x) if plain else x.new_empty(0),
        ),
        "gated_residual_norm_backward": lambda grad_y, grad, plain, y, branch, gate, scale, eps: (
            like(y),
            like(y),
            like(gate),
            like(scale),
        ),
        "norm_rope": lambda x, weight, rotation, eps: like(x),
        "norm_rope_backward": lambda grad, x, weight, rotation, eps: (like(x), like(weight)),
        "rms_norm": lambda x, weight, eps: like(x),
        "rms_norm_backward": lambda grad, x, weight, eps: (like(x), like(weight)),
        "square_sum": lambda tensors: tensors[0].new_empty((), dtype=torch.float64),
        "swiglu": lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
        "swiglu_backward": lambda grad, gate_up: like(gate_up),
    }
    gradients = {
        "combine_rows": (_combine_backward, _combine_save),
        "modulated_layer_norm": (_modulated_backward, _modulated_save),
        "gated_residual_norm": (_gated_backward, _gated_save),
        "norm_rope": (_norm_rope_backward, _norm_rope_save),
        "rms_norm": (_rms_backward, _rms_save),
        "swiglu": (_swiglu_backward, _swiglu_save),
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"megatron_nucleus::{name}", shape)
    for name, (backward, save) in gradients.items():
        torch.library.register_autograd(f"megatron_nucleus::{name}", backward, setup_context=save)
        torch.library.register_autograd(f"megatron_nucleus::{name}_backward", no_second_derivative)


_register()
