"""Row gather and weighted scatter-add around the experts, without atomics.

A scatter-add is turned into one segment sum per token: the rows are sorted by token (a stable sort, on the device,
no host sync), and the program of a token adds its rows in that order. The result is the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check, check_index, check_shape, power_of_two

ROWS = 8  # rows of a tile; with 256 columns it is 8 values per thread at 8 warps
COLUMNS = 256
WARPS = 8


@triton.jit
def gather_kernel(x, index, out, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[n] = x[index[n]]."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(index + n, mask=n < N, other=0)
    inside = (n < N)[:, None] & (d < D)[None, :]
    values = tl.load(x + row[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(out + n[:, None] * D + d[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def segment_sum_kernel(
    base,
    rows,
    weight,
    order,
    starts,
    out,
    T,
    D,
    HAS_BASE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[t] = base[t] + sum of weight[r] * rows[r] over r in order[starts[t] : starts[t + 1]]."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (t < T)[:, None] & (d < D)[None, :]
    place = t[:, None] * D + d[None, :]
    if HAS_BASE:
        total = tl.load(base + place, mask=inside, other=0).to(tl.float32)
    else:
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    first = tl.load(starts + t, mask=t < T, other=0)
    last = tl.load(starts + t + 1, mask=t < T, other=0)
    for i in range(0, tl.max(last - first, axis=0).to(tl.int32)):
        live = first + i < last
        row = tl.load(order + first + i, mask=live, other=0)
        wanted = live[:, None] & (d < D)[None, :]
        values = tl.load(rows + row[:, None] * D + d[None, :], mask=wanted, other=0).to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight + row, mask=live, other=0).to(tl.float32)
            values = values * w[:, None]
        total += values
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(
    grad, rows, weight, index, grad_rows, grad_weight, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_rows[n] = weight[n] * grad[index[n]];  grad_weight[n] = <grad[index[n]], rows[n]>."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < N
    token = tl.load(index + n, mask=live, other=0)
    w = tl.load(weight + n, mask=live, other=0).to(tl.float32)
    dot = tl.zeros([ROWS], dtype=tl.float32)
    for begin in range(0, D, COLUMNS):
        d = begin + tl.arange(0, COLUMNS)
        inside = live[:, None] & (d < D)[None, :]
        g = tl.load(grad + token[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        r = tl.load(rows + n[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        dot += tl.sum(g * r, axis=1)
        scaled = g * w[:, None]
        tl.store(grad_rows + n[:, None] * D + d[None, :], scaled.to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_weight + n, dot.to(grad_weight.dtype.element_ty), mask=live)


def _tiles(items: int, width: int) -> tuple[tuple[int, int], int]:
    columns = min(COLUMNS, power_of_two(width))
    return (triton.cdiv(items, ROWS), triton.cdiv(width, columns)), columns


def _segment_sum(
    base: Tensor | None, rows: Tensor, weight: Tensor | None, index: Tensor, tokens: int
) -> Tensor:
    D = rows.shape[1]
    out = rows.new_empty(tokens, D)
    if out.numel() == 0:
        return out
    sorted_index, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(sorted_index, torch.arange(tokens + 1, device=index.device))
    grid, columns = _tiles(tokens, D)
    segment_sum_kernel[grid](
        rows if base is None else base,
        rows,
        rows if weight is None else weight,
        order,
        starts,
        out,
        tokens,
        D,
        HAS_BASE=base is not None,
        HAS_WEIGHT=weight is not None,
        ROWS=ROWS,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return out


def _check_rows(op: str, name: str, tokens: Tensor, rows: Tensor, weight: Tensor, index: Tensor) -> None:
    check(op, **{name: tokens}, rows=rows, weight=weight)
    check_index(op, index)
    if tokens.dim() != 2:
        raise ValueError(f"{op}: {name} must be [T, D], got {list(tokens.shape)}")
    check_shape(op, (index.shape[0], tokens.shape[1]), rows=rows)
    check_shape(op, (index.shape[0],), weight=weight)


@torch.library.custom_op("triton_ops::gather_rows", mutates_args=())
def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [N] int64 of ``x`` [T, D]; every index must lie in [0, T)."""
    check("gather_rows", x=x)
    check_index("gather_rows", index)
    if x.dim() != 2:
        raise ValueError(f"gather_rows: x must be [T, D], got {list(x.shape)}")
    out = x.new_empty(index.shape[0], x.shape[1])
    if out.numel():
        grid, columns = _tiles(*out.shape)
        gather_kernel[grid](x, index, out, *out.shape, ROWS=ROWS, COLUMNS=columns, num_warps=WARPS)
    return out


@torch.library.custom_op("triton_ops::gather_rows_backward", mutates_args=())
def gather_rows_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Gradient of `gather_rows`: the rows of each token, added."""
    check("gather_rows_backward", grad=grad)
    check_index("gather_rows_backward", index)
    check_shape("gather_rows_backward", (index.shape[0], grad.shape[-1]), grad=grad)
    return _segment_sum(None, grad, None, index, tokens)


@torch.library.custom_op("triton_ops::combine_rows", mutates_args=())
def combine_rows(base: Tensor, rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """``base`` [T, D] + the sum over n of ``weight[n] * rows[n]`` at ``index[n]``; ``base`` is left unchanged."""
    _check_rows("combine_rows", "base", base, rows, weight, index)
    return _segment_sum(base, rows, weight, index, base.shape[0])


@torch.library.custom_op("triton_ops::combine_rows_backward", mutates_args=())
def combine_rows_backward(grad: Tensor, rows: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `combine_rows` for rows and weight (that for base is ``grad`` itself)."""
    _check_rows("combine_rows_backward", "grad", grad, rows, weight, index)
    N, D = rows.shape
    grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
    if rows.numel():
        columns = min(COLUMNS, power_of_two(D))
        grid = (triton.cdiv(N, ROWS),)
        combine_backward_kernel[grid](
            grad,
            rows,
            weight,
            index,
            grad_rows,
            grad_weight,
            N,
            D,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=WARPS,
        )
    return grad_rows, grad_weight


def _gather_save(ctx, inputs, output) -> None:
    x, index = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(index)


def _gather_grad(ctx, grad: Tensor):
    return gather_rows_backward(grad.contiguous(), ctx.saved_tensors[0], ctx.tokens), None


def _combine_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _combine_grad(ctx, grad: Tensor):
    return grad, *combine_rows_backward(grad.contiguous(), *ctx.saved_tensors), None


gather_rows.register_fake(lambda x, index: x.new_empty(index.shape[0], x.shape[1]))
gather_rows_backward.register_fake(lambda grad, index, tokens: grad.new_empty(tokens, grad.shape[1]))
combine_rows.register_fake(lambda base, rows, weight, index: torch.empty_like(base))
combine_rows_backward.register_fake(
    lambda grad, rows, weight, index: (torch.empty_like(rows), torch.empty_like(weight))
)
gather_rows.register_autograd(_gather_grad, setup_context=_gather_save)
combine_rows.register_autograd(_combine_grad, setup_context=_combine_save)
