"""SwiGLU over packed ``[gate, up]`` rows: one pass forward, one pass backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check, check_shape, power_of_two
from triton_ops.tuning import Tile, pick, shape_class

DEFAULT = Tile(rows=4, columns=512, depth=1, warps=8, stages=1)  # 8 values of each half per thread
CANDIDATES = (
    DEFAULT,
    Tile(2, 1024, 1, 8, 1),
    Tile(8, 256, 1, 8, 1),
    Tile(4, 256, 1, 4, 1),
    Tile(1, 1024, 1, 4, 1),
)


@triton.jit
def forward_kernel(gate_up, out, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[n, f] = silu(gate_up[n, f]) * gate_up[n, F + f]."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (f < F)[None, :]
    place = n[:, None] * (2 * F) + f[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + place + F, mask=inside, other=0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + n[:, None] * F + f[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad, gate_up, grad_gate_up, out, N, F, WITH_OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_gate_up[n] of grad[n]; out, the forward's result, is written again only if WITH_OUT."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (f < F)[None, :]
    place = n[:, None] * (2 * F) + f[None, :]
    narrow = n[:, None] * F + f[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + place + F, mask=inside, other=0).to(tl.float32)
    g = tl.load(grad + narrow, mask=inside, other=0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    # d silu = sigmoid * (1 + gate * (1 - sigmoid)), with the sigmoid inside: finite for any finite gate.
    grad_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    kind = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + place, grad_gate.to(kind), mask=inside)
    tl.store(grad_gate_up + place + F, (g * silu).to(kind), mask=inside)
    if WITH_OUT:
        tl.store(out + narrow, (silu * up).to(kind), mask=inside)


def tile_for(gate_up: Tensor) -> Tile:
    """Tile of both kernels for rows ``gate_up`` [N, 2F]."""
    return pick("swiglu", shape_of(gate_up), DEFAULT, gate_up.device)


def shape_of(gate_up: Tensor) -> str:
    """Shape class."""
    return shape_class(gate_up.dtype, about={"N": gate_up.shape[0]}, exactly={"F": gate_up.shape[1] // 2})


def _grid(N: int, F: int, tile: Tile) -> tuple[tuple[int, int], int]:
    columns = min(tile.columns, power_of_two(F))
    return (triton.cdiv(N, tile.rows), triton.cdiv(F, columns)), columns


def launch_forward(gate_up: Tensor, out: Tensor, tile: Tile) -> None:
    """Fill ``out`` [N, F] from ``gate_up`` [N, 2F]; neither may be empty."""
    N, F = out.shape
    grid, columns = _grid(N, F, tile)
    forward_kernel[grid](gate_up, out, N, F, ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps)


def launch_backward(
    grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor, out: Tensor | None, tile: Tile
) -> None:
    """Fill ``grad_gate_up`` [N, 2F] and, unless it is None, ``out`` [N, F]; none may be empty."""
    N, F = grad.shape
    grid, columns = _grid(N, F, tile)
    backward_kernel[grid](
        grad,
        gate_up,
        grad_gate_up,
        grad if out is None else out,
        N,
        F,
        WITH_OUT=out is not None,
        ROWS=tile.rows,
        COLUMNS=columns,
        num_warps=tile.warps,
    )


def _check(op: str, gate_up: Tensor, **others: Tensor) -> None:
    check(op, gate_up=gate_up, **others)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"{op}: gate_up must be [N, 2F], got {list(gate_up.shape)}")


@torch.library.custom_op("triton_ops::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``gate_up`` [N, 2F], gates first; [N, F]."""
    _check("swiglu", gate_up)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    if out.numel():
        launch_forward(gate_up, out, tile_for(gate_up))
    return out


@torch.library.custom_op("triton_ops::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate_up: Tensor, with_out: bool) -> tuple[Tensor, Tensor]:
    """Gradient of `swiglu` for ``gate_up``, and its result once more if ``with_out`` (else empty)."""
    _check("swiglu_backward", gate_up, grad=grad)
    check_shape("swiglu_backward", (gate_up.shape[0], gate_up.shape[1] // 2), grad=grad)
    grad_gate_up = torch.empty_like(gate_up)
    out = torch.empty_like(grad) if with_out else grad.new_empty(0)
    if grad.numel():
        launch_backward(grad, gate_up, grad_gate_up, out if with_out else None, tile_for(gate_up))
    return grad_gate_up, out


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx, grad: Tensor):
    return swiglu_backward(grad.contiguous(), ctx.saved_tensors[0], False)[0]


swiglu.register_fake(lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2))
swiglu_backward.register_fake(
    lambda grad, gate_up, with_out: (
        torch.empty_like(gate_up),
        torch.empty_like(grad) if with_out else grad.new_empty(0),
    )
)
swiglu.register_autograd(_grad, setup_context=_save)
