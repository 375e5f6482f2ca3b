"""RMSNorm of every head and rotary positions in one pass, with gradients.

Rows are heads, ``[B, T, H, K]`` one behind the other: row r stands at position ``r // H % T``. A rotation is
(cos, sin) of a pair of neighbouring channels, ``[T, K/2, 2]`` in fp32. Neighbours lie in one thread, so taking pairs
apart moves nothing; the heads of a token read their rotation from the cache. The gradient of the weight is summed
over fixed chunks of rows and then over the chunks: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check, check_launchable, check_shape, power_of_two

# Values of a tile: 8 per thread and array at 8 warps, so that two blocks fit (tests/triton_ops/test_compile.py).
TILE = 2048
MAX_WIDTH = 2048  # a row must fit one tile
MAX_ROWS = 32
CHUNK = 256  # rows whose weight gradient one program sums; at 16 heads 256 programs per image of 1024 px
WARPS = 8


@triton.jit
def forward_kernel(x, weight, rotation, out, N, T, H, K, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [ROWS] of x [N, K]; out may have another dtype than x."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    inside = (n < N)[:, None] & (k < K)[None, :]
    place = n[:, None] * K + k[None, :]
    values = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + k, mask=k < K, other=0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / K + eps)
    normal = values * inverse_rms[:, None] * w[None, :]
    even, odd = tl.split(tl.reshape(normal, [ROWS, WIDTH // 2, 2]))
    position = n // H % T
    turn = tl.load(rotation + position[:, None] * K + k[None, :], mask=inside, other=0)
    cosine, sine = tl.split(tl.reshape(turn, [ROWS, WIDTH // 2, 2]))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(out + place, tl.reshape(turned, [ROWS, WIDTH]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    x,
    weight,
    rotation,
    grad_x,
    partial,
    N,
    T,
    H,
    K,
    eps,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows [CHUNK], ROWS at a time; partial [chunks, K] fp32 sums of the weight gradient."""
    chunk = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    w = tl.load(weight + k, mask=k < K, other=0).to(tl.float32)
    total = tl.zeros(
        [ROWS, WIDTH], dtype=tl.float32
    )  # over rows only at the end: they lie in different warps
    for first in range(0, CHUNK, ROWS):
        n = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (k < K)[None, :]
        place = n[:, None] * K + k[None, :]
        position = n // H % T
        turn = tl.load(rotation + position[:, None] * K + k[None, :], mask=inside, other=0)
        cosine, sine = tl.split(tl.reshape(turn, [ROWS, WIDTH // 2, 2]))
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        even, odd = tl.split(tl.reshape(g, [ROWS, WIDTH // 2, 2]))
        back = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
        inner = tl.reshape(back, [ROWS, WIDTH])
        values = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        inverse_rms = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / K + eps)
        inverse_rms = tl.where(n < N, inverse_rms, 0.0)  # rows that do not exist add 0 even where eps is 0
        normal = values * inverse_rms[:, None]
        total += inner * normal
        inner *= w[None, :]
        mean_dot = tl.sum(inner * normal, axis=1) / K
        out = inverse_rms[:, None] * (inner - normal * mean_dot[:, None])
        tl.store(grad_x + place, out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + chunk * K + k, tl.sum(total, axis=0), mask=k < K)


def tile(width: int) -> tuple[int, int]:
    """Rows and padded width of a tile for rows of ``width`` values.

    Raises:
        ValueError: a row is wider than `MAX_WIDTH`, or of odd width.
    """
    if width > MAX_WIDTH or width % 2:
        raise ValueError(f"norm_rope takes heads of an even width up to {MAX_WIDTH}, got {width}")
    padded = power_of_two(width)
    return min(MAX_ROWS, TILE // padded), padded


def _check(op: str, x: Tensor, weight: Tensor, rotation: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [B, T, H, K], got {list(x.shape)}")
    T, K = x.shape[1], x.shape[3]
    check(op, x=x)
    check(op, weight=weight)  # on its own: it may have another dtype
    check_launchable(op, rotation=rotation)
    if rotation.dtype != torch.float32 or rotation.shape != (T, K // 2, 2) or weight.shape != (K,):
        raise ValueError(
            f"{op}: for x {list(x.shape)} weight must be [{K}] and rotation [{T}, {K // 2}, 2] in float32, got "
            f"{list(weight.shape)} and {list(rotation.shape)}"
        )


def result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The weight's dtype where that is half precision, else the promoted one of both."""
    return weight.dtype if weight.dtype.itemsize == 2 else torch.promote_types(x.dtype, weight.dtype)


@torch.library.custom_op("triton_ops::norm_rope", mutates_args=())
def norm_rope(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """RMSNorm over K, then the rotation, of ``x`` [B, T, H, K]; `result_dtype`.

    weight: [K]; it may have another dtype than x. rotation: [T, K/2, 2] fp32, (cos, sin) of every pair.
    """
    _check("norm_rope", x, weight, rotation)
    _, T, H, K = x.shape
    rows, width = tile(K)
    out = torch.empty_like(x, dtype=result_dtype(x, weight))
    if x.numel():
        N = x.numel() // K
        grid = (triton.cdiv(N, rows),)
        forward_kernel[grid](
            x, weight, rotation, out, N, T, H, K, eps, ROWS=rows, WIDTH=width, num_warps=WARPS
        )
    return out


@torch.library.custom_op("triton_ops::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rotation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `norm_rope` for x and weight, in their dtypes."""
    _check("norm_rope_backward", x, weight, rotation)
    check("norm_rope_backward", grad=grad)
    check_shape("norm_rope_backward", x.shape, grad=grad)
    _, T, H, K = x.shape
    rows, width = tile(K)
    N = x.numel() // K
    chunks = triton.cdiv(N, CHUNK)
    grad_x = torch.empty_like(x)
    partial = x.new_empty(chunks, K, dtype=torch.float32)
    if x.numel():
        backward_kernel[(chunks,)](
            grad,
            x,
            weight,
            rotation,
            grad_x,
            partial,
            N,
            T,
            H,
            K,
            eps,
            CHUNK=CHUNK,
            ROWS=rows,
            WIDTH=width,
            num_warps=WARPS,
        )
    return grad_x, partial.sum(0).to(weight.dtype)


def _save(ctx, inputs, output) -> None:
    *saved, ctx.eps = inputs
    ctx.save_for_backward(*saved)


def _grad(ctx, grad: Tensor):
    return *norm_rope_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None, None


norm_rope.register_fake(lambda x, weight, rotation, eps: torch.empty_like(x, dtype=result_dtype(x, weight)))
norm_rope_backward.register_fake(
    lambda grad, x, weight, rotation, eps: (torch.empty_like(x), torch.empty_like(weight))
)
norm_rope.register_autograd(_grad, setup_context=_save)
