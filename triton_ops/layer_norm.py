"""Affine-free LayerNorm with adaptive scale: ``LN(x) * (1 + scale)``, with or without ``LN(x)`` itself.

One program normalises a few tokens of one image, a whole row in registers. The gradient of the scale is summed over
fixed chunks of tokens and then over the chunks: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check_images, power_of_two

# Values of a tile: at 8 warps 16 per thread and array, no spills (tests/triton_ops/test_compile.py).
TILE = 4096
MAX_WIDTH = 8192  # a row must fit one tile
MAX_ROWS = 8
CHUNK = 64  # tokens whose scale gradient one program sums
WARPS = 8


@triton.jit
def standardise(values, live, inside, D, eps):
    """``values`` [ROWS, WIDTH] less their mean over D, divided by their deviation, and 1 / deviation [ROWS].

    live: rows that exist; inside: values that do. The others are 0, whatever eps is.
    """
    mean = tl.sum(values, axis=1) / D
    centred = tl.where(inside, values - mean[:, None], 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    inverse_std = tl.where(live, inverse_std, 0.0)
    return centred * inverse_std[:, None], inverse_std


@triton.jit
def standardise_gradient(inner, normal, inverse_std, D):
    """Gradient of `standardise` for its values. inner: the gradient of ``normal``, its first result."""
    mean_inner = tl.sum(inner, axis=1) / D
    mean_dot = tl.sum(inner * normal, axis=1) / D
    return inverse_std[:, None] * (inner - mean_inner[:, None] - normal * mean_dot[:, None])


@triton.jit
def forward_kernel(
    x, scale, modulated, plain, S, D, eps, HAS_PLAIN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Tokens [ROWS] of one image; scale [B, D]; plain is written only if HAS_PLAIN."""
    # Tiles of one image. All images lie on the grid's first axis, the only one that takes over 65,535.
    tiles = tl.cdiv(S, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (s < S)[:, None] & (d < D)[None, :]
    place = (image * S + s)[:, None] * D + d[None, :]
    values = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    normal, _ = standardise(values, s < S, inside, D, eps)
    factor = 1.0 + tl.load(scale + image * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(modulated + place, (normal * factor[None, :]).to(modulated.dtype.element_ty), mask=inside)
    if HAS_PLAIN:
        tl.store(plain + place, normal.to(plain.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    grad_plain,
    x,
    scale,
    grad_x,
    partial,
    S,
    D,
    eps,
    HAS_PLAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tokens [CHUNK] of one image, ROWS at a time; partial [B, chunks, D] fp32 sums of the scale gradient."""
    chunks = tl.cdiv(S, CHUNK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    d = tl.arange(0, WIDTH)
    factor = 1.0 + tl.load(scale + image * D + d, mask=d < D, other=0).to(tl.float32)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(0, CHUNK, ROWS):
        s = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (s < S)[:, None] & (d < D)[None, :]
        place = (image * S + s)[:, None] * D + d[None, :]
        values = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        normal, inverse_std = standardise(values, s < S, inside, D, eps)
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        total += tl.sum(g * normal, axis=0)
        inner = g * factor[None, :]
        if HAS_PLAIN:
            inner += tl.load(grad_plain + place, mask=inside, other=0).to(tl.float32)
        out = standardise_gradient(inner, normal, inverse_std, D)
        tl.store(grad_x + place, out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + d, total, mask=d < D)


def tile(width: int, op: str = "modulated_layer_norm", most: int = MAX_WIDTH) -> tuple[int, int]:
    """Rows and padded width of a tile for rows of ``width`` values. op: who asks, for the message.

    Raises:
        ValueError: a row is wider than ``most``.
    """
    if width > most:
        raise ValueError(f"{op} takes rows of at most {most} values, got {width}")
    padded = power_of_two(width)
    return max(1, min(MAX_ROWS, TILE // padded)), padded


@torch.library.custom_op("triton_ops::modulated_layer_norm", mutates_args=())
def modulated_layer_norm(x: Tensor, scale: Tensor, eps: float, with_plain: bool) -> tuple[Tensor, Tensor]:
    """``(LN(x) * (1 + scale), LN(x))`` of ``x`` [B, S, D], ``scale`` [B, D]; the second is empty unless asked for."""
    check_images("modulated_layer_norm", {"x": x}, {"scale": scale})
    B, S, D = x.shape
    rows, width = tile(D)
    modulated = torch.empty_like(x)
    plain = torch.empty_like(x) if with_plain else x.new_empty(0)
    if x.numel():
        forward_kernel[(B * triton.cdiv(S, rows),)](
            x,
            scale,
            modulated,
            plain,
            S,
            D,
            eps,
            HAS_PLAIN=with_plain,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
        )
    return modulated, plain


@torch.library.custom_op("triton_ops::modulated_layer_norm_backward", mutates_args=())
def modulated_layer_norm_backward(
    grad: Tensor, grad_plain: Tensor | None, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `modulated_layer_norm` for x and scale; ``grad_plain`` is None if LN(x) was not asked for."""
    stream = {"x": x, "grad": grad} | ({} if grad_plain is None else {"grad_plain": grad_plain})
    check_images("modulated_layer_norm_backward", stream, {"scale": scale})
    B, S, D = x.shape
    rows, width = tile(D)
    chunks = triton.cdiv(S, CHUNK)
    grad_x = torch.empty_like(x)
    partial = x.new_empty(B, chunks, D, dtype=torch.float32)
    if x.numel():
        backward_kernel[(B * chunks,)](
            grad,
            grad if grad_plain is None else grad_plain,
            x,
            scale,
            grad_x,
            partial,
            S,
            D,
            eps,
            HAS_PLAIN=grad_plain is not None,
            CHUNK=CHUNK,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
        )
    return grad_x, partial.sum(1).to(scale.dtype)


def _save(ctx, inputs, output) -> None:
    x, scale, ctx.eps, ctx.with_plain = inputs
    ctx.save_for_backward(x, scale)


def _grad(ctx, grad: Tensor, grad_plain: Tensor):
    x, scale = ctx.saved_tensors
    plain = grad_plain.contiguous() if ctx.with_plain else None
    return *modulated_layer_norm_backward(grad.contiguous(), plain, x, scale, ctx.eps), None, None


modulated_layer_norm.register_fake(
    lambda x, scale, eps, with_plain: (
        torch.empty_like(x),
        torch.empty_like(x) if with_plain else x.new_empty(0),
    )
)
modulated_layer_norm_backward.register_fake(
    lambda grad, grad_plain, x, scale, eps: (torch.empty_like(x), torch.empty_like(scale))
)
modulated_layer_norm.register_autograd(_grad, setup_context=_save)
