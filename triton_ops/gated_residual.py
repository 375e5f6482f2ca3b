"""A gated residual and the norm behind it: ``y = x + gate * branch``, ``LN(y) * (1 + scale)`` and perhaps ``LN(y)``.

Laid out as layer_norm.py: one program has a few tokens of one image, a row is read once and written once. The
gradients of gate and scale are summed over fixed chunks of tokens and then over the chunks: no atomics, the same bits
every time. The backward pass reads ``y``, which the model keeps anyway, and not ``x``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check_images
from triton_ops.layer_norm import CHUNK, WARPS, standardise, standardise_gradient, tile

MAX_WIDTH = 4096  # wider rows do not leave the backward pass's two sums enough registers


def warps(width: int) -> int:
    """Warps for rows padded to ``width``: wide ones need more threads for the backward pass's two sums."""
    return WARPS if width <= 2048 else 2 * WARPS


@triton.jit
def forward_kernel(
    x,
    branch,
    gate,
    scale,
    y,
    modulated,
    plain,
    S,
    D,
    eps,
    HAS_PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tokens [ROWS] of one image; gate and scale [B, D]; plain is written only if HAS_PLAIN."""
    tiles = tl.cdiv(S, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (s < S)[:, None] & (d < D)[None, :]
    place = (image * S + s)[:, None] * D + d[None, :]
    g = tl.load(gate + image * D + d, mask=d < D, other=0).to(tl.float32)
    total = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    total += g[None, :] * tl.load(branch + place, mask=inside, other=0).to(tl.float32)
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + place, rounded, mask=inside)
    # The norm sees y as it is returned, as its gradient does.
    normal, _ = standardise(rounded.to(tl.float32), s < S, inside, D, eps)
    factor = 1.0 + tl.load(scale + image * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(modulated + place, (normal * factor[None, :]).to(modulated.dtype.element_ty), mask=inside)
    if HAS_PLAIN:
        tl.store(plain + place, normal.to(plain.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_y,
    grad,
    grad_plain,
    y,
    branch,
    gate,
    scale,
    grad_x,
    grad_branch,
    partial,
    S,
    D,
    eps,
    HAS_PLAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tokens [CHUNK] of one image, ROWS at a time; partial [2, B, chunks, D] fp32: sums for gate, scale."""
    chunks = tl.cdiv(S, CHUNK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    d = tl.arange(0, WIDTH)
    g = tl.load(gate + image * D + d, mask=d < D, other=0).to(tl.float32)
    factor = 1.0 + tl.load(scale + image * D + d, mask=d < D, other=0).to(tl.float32)
    sum_gate = tl.zeros([WIDTH], dtype=tl.float32)
    sum_scale = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(0, CHUNK, ROWS):
        s = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (s < S)[:, None] & (d < D)[None, :]
        place = (image * S + s)[:, None] * D + d[None, :]
        values = tl.load(y + place, mask=inside, other=0).to(tl.float32)
        normal, inverse_std = standardise(values, s < S, inside, D, eps)
        inner = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        sum_scale += tl.sum(inner * normal, axis=0)
        inner *= factor[None, :]
        if HAS_PLAIN:
            inner += tl.load(grad_plain + place, mask=inside, other=0).to(tl.float32)
        total = standardise_gradient(inner, normal, inverse_std, D)
        total += tl.load(grad_y + place, mask=inside, other=0).to(tl.float32)
        sum_gate += tl.sum(total * tl.load(branch + place, mask=inside, other=0).to(tl.float32), axis=0)
        kind = grad_x.dtype.element_ty
        tl.store(grad_x + place, total.to(kind), mask=inside)
        tl.store(grad_branch + place, (total * g[None, :]).to(kind), mask=inside)
    row = tl.program_id(0).to(tl.int64)
    tl.store(partial + row * D + d, sum_gate, mask=d < D)
    tl.store(partial + (tl.num_programs(0) + row) * D + d, sum_scale, mask=d < D)


@torch.library.custom_op("triton_ops::gated_residual_norm", mutates_args=())
def gated_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float, with_plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, LN(y) * (1 + scale), LN(y))``, ``y = x + gate * branch``; the last is empty unless asked for.

    x, branch [B, S, D]; gate, scale [B, D].
    """
    check_images("gated_residual_norm", {"x": x, "branch": branch}, {"gate": gate, "scale": scale})
    B, S, D = x.shape
    rows, width = tile(D, "gated_residual_norm", MAX_WIDTH)
    y, modulated = torch.empty_like(x), torch.empty_like(x)
    plain = torch.empty_like(x) if with_plain else x.new_empty(0)
    if x.numel():
        forward_kernel[(B * triton.cdiv(S, rows),)](
            x,
            branch,
            gate,
            scale,
            y,
            modulated,
            plain,
            S,
            D,
            eps,
            HAS_PLAIN=with_plain,
            ROWS=rows,
            WIDTH=width,
            num_warps=warps(width),
        )
    return y, modulated, plain


@torch.library.custom_op("triton_ops::gated_residual_norm_backward", mutates_args=())
def gated_residual_norm_backward(
    grad_y: Tensor,
    grad: Tensor,
    grad_plain: Tensor | None,
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_residual_norm` for x, branch, gate, scale; ``grad_plain`` None if LN(y) was not asked for."""
    stream = {"y": y, "branch": branch, "grad_y": grad_y, "grad": grad}
    if grad_plain is not None:
        stream["grad_plain"] = grad_plain
    check_images("gated_residual_norm_backward", stream, {"gate": gate, "scale": scale})
    B, S, D = y.shape
    rows, width = tile(D, "gated_residual_norm", MAX_WIDTH)
    chunks = triton.cdiv(S, CHUNK)
    grad_x, grad_branch = torch.empty_like(y), torch.empty_like(y)
    partial = y.new_empty(2, B, chunks, D, dtype=torch.float32)
    if y.numel():
        backward_kernel[(B * chunks,)](
            grad_y,
            grad,
            grad if grad_plain is None else grad_plain,
            y,
            branch,
            gate,
            scale,
            grad_x,
            grad_branch,
            partial,
            S,
            D,
            eps,
            HAS_PLAIN=grad_plain is not None,
            CHUNK=CHUNK,
            ROWS=rows,
            WIDTH=width,
            num_warps=warps(width),
        )
    grad_gate, grad_scale = (sums.sum(1).to(y.dtype) for sums in partial)
    return grad_x, grad_branch, grad_gate, grad_scale


def _save(ctx, inputs, output) -> None:
    _, branch, gate, scale, ctx.eps, ctx.with_plain = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)


def _grad(ctx, grad_y: Tensor, grad: Tensor, grad_plain: Tensor):
    plain = grad_plain.contiguous() if ctx.with_plain else None
    grads = (grad_y.contiguous(), grad.contiguous(), plain)
    return *gated_residual_norm_backward(*grads, *ctx.saved_tensors, ctx.eps), None, None


gated_residual_norm.register_fake(
    lambda x, branch, gate, scale, eps, with_plain: (
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty_like(x) if with_plain else x.new_empty(0),
    )
)
gated_residual_norm_backward.register_fake(
    lambda grad_y, grad, grad_plain, y, branch, gate, scale, eps: (
        torch.empty_like(y),
        torch.empty_like(y),
        torch.empty_like(gate),
        torch.empty_like(scale),
    )
)
gated_residual_norm.register_autograd(_grad, setup_context=_save)
