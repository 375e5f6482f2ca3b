"""The experts' feed-forward: batched products, SwiGLU fused into the first one or in a pass of its own.

Fused: one program makes the gate tile and the up tile of the same columns, so SwiGLU runs on its sums in registers,
and the activation is the only thing that leaves the chip; with gradients, the rows before SwiGLU leave it, too.

What is kept for the backward pass, per row of bf16 at F = 1344: the 2F values before SwiGLU, 5.25 KiB. Not the F
values behind it: the pass that makes SwiGLU's gradient reads all it needs and writes them again. Making the 2F values
again as well would keep nothing, but costs 2 * 2048 * 2688 = 11 MFLOP a row, 14 ns at 790 TFLOP/s, where writing and
reading them is 10.5 KiB, 2.2 ns at an H200's 4.8 TB/s. Activation checkpointing still drops them where memory is short.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_ops.launch import check, check_matrix, power_of_two
from triton_ops.swiglu import swiglu, swiglu_backward
from triton_ops.tuning import Tile, pick, shape_class

# 128 x (128 gate + 128 up): the sums take 128 registers per thread at 8 warps, 48 KiB of shared memory per stage in
# half precision. fp32 takes three products for each, so its tile is a quarter.
DEFAULT = Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
DEFAULT_FP32 = DEFAULT._replace(columns=64, depth=32)
CANDIDATES = (
    DEFAULT,
    DEFAULT_FP32,
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
GROUP = 8  # row tiles that walk the columns together, so that they share the weights' tiles in the L2 cache


@triton.jit
def gate_up_kernel(
    x,
    weight,
    hidden,
    gate_up,
    N,
    D,
    F,
    KEEP: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows of expert program_id(1): hidden [N, F] = silu(x @ gate) * (x @ up); gate_up [N, 2F] too if KEEP."""
    expert = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0)
    per_group = GROUP * tl.cdiv(F, COLUMNS)
    first_tile = p // per_group * GROUP
    height = tl.minimum(tl.cdiv(N, ROWS) - first_tile, GROUP)
    row_tile = first_tile + p % per_group % height
    n = row_tile * ROWS + tl.arange(0, ROWS)
    f = p % per_group // height * COLUMNS + tl.arange(0, COLUMNS)
    x += (expert * N + row_tile * ROWS) * D
    weight += expert * D * 2 * F
    local = tl.arange(0, ROWS)
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        left = tl.load(x + local[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0)
        place = d[:, None] * (2 * F) + f[None, :]
        inside = (d < D)[:, None] & (f < F)[None, :]
        gates = tl.load(weight + place, mask=inside, other=0)
        ups = tl.load(weight + place + F, mask=inside, other=0)
        if INTERPRET:
            left, gates, ups = left.to(tl.float32), gates.to(tl.float32), ups.to(tl.float32)
        gate = tl.dot(left, gates, gate, input_precision="tf32x3")
        up = tl.dot(left, ups, up, input_precision="tf32x3")
    kind = hidden.dtype.element_ty
    # Rounded first: the backward pass, which has only what is kept, then makes the very same activation.
    rounded_gate, rounded_up = gate.to(kind), up.to(kind)
    row = expert * N + n
    inside = (n < N)[:, None] & (f < F)[None, :]
    if KEEP:
        place = row[:, None] * (2 * F) + f[None, :]
        tl.store(gate_up + place, rounded_gate, mask=inside)
        tl.store(gate_up + place + F, rounded_up, mask=inside)
    gate, up = rounded_gate.to(tl.float32), rounded_up.to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(hidden + row[:, None] * F + f[None, :], value.to(kind), mask=inside)


def tile_for(x: Tensor, hidden_width: int) -> Tile:
    """Tile for rows ``x`` [E, N, D] and F = ``hidden_width``."""
    return pick("expert_ffn", shape_of(x, hidden_width), default_tile(x.dtype), x.device)


def shape_of(x: Tensor, hidden_width: int) -> str:
    """Shape class; how many experts there are does not count."""
    return shape_class(x.dtype, about={"N": x.shape[1]}, exactly={"D": x.shape[2], "F": hidden_width})


def default_tile(dtype: torch.dtype) -> Tile:
    """The tile where none was measured."""
    return DEFAULT_FP32 if dtype == torch.float32 else DEFAULT


def launch(x: Tensor, weight: Tensor, hidden: Tensor, gate_up: Tensor | None, tile: Tile) -> None:
    """Fill ``hidden`` [E, N, F] and, unless it is None, ``gate_up`` [E, N, 2F]; nothing may be empty."""
    E, N, D = x.shape
    F = hidden.shape[2]
    rows, columns, depth = (
        min(limit, max(16, power_of_two(size)))  # 16: the least side of a product on tensor cores
        for limit, size in ((tile.rows, N), (tile.columns, F), (tile.depth, D))
    )
    gate_up_kernel[(triton.cdiv(N, rows) * triton.cdiv(F, columns), E)](
        x,
        weight,
        hidden,
        hidden if gate_up is None else gate_up,
        N,
        D,
        F,
        KEEP=gate_up is not None,
        INTERPRET=triton.knobs.runtime.interpret,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@torch.library.custom_op("triton_ops::expert_gate_up", mutates_args=())
def expert_gate_up(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``(silu(x @ gate) * (x @ up), x @ weight)`` of every expert; the second is empty unless ``keep``.

    Args:
        x: [E, N, D]. weight: [E, D, 2F], the gate half first. No gradient: `ExpertFFN` has it.
    """
    check("expert_gate_up", x=x, weight=weight)
    if x.dim() != 3:
        raise ValueError(f"expert_gate_up: x must be [E, N, D], got {list(x.shape)}")
    check_matrix("expert_gate_up", "weight", weight)
    E, N, D = x.shape
    if weight.dim() != 3 or weight.shape[:2] != (E, D) or weight.shape[2] % 2:
        raise ValueError(f"expert_gate_up: weight must be [{E}, {D}, 2F], got {list(weight.shape)}")
    F = weight.shape[2] // 2
    hidden = x.new_empty(E, N, F)
    gate_up = x.new_empty(E, N, 2 * F) if keep else x.new_empty(0)
    if hidden.numel():
        launch(x, weight, hidden, gate_up if keep else None, tile_for(x, F))
    return hidden, gate_up


expert_gate_up.register_fake(
    lambda x, weight, keep: (
        x.new_empty(*x.shape[:2], weight.shape[2] // 2),
        x.new_empty(*x.shape[:2], weight.shape[2]) if keep else x.new_empty(0),
    )
)


@register_flop_formula(torch.ops.triton_ops.expert_gate_up)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_, **__) -> int:
    """Of the product, as `FlopCounterMode` counts torch's own."""
    return 2 * x_shape.numel() * weight_shape[2]


class ExpertFFN(torch.autograd.Function):
    """``(silu(x @ gate) * (x @ up)) @ down`` of every expert; arguments of `forward`, contiguous and of one dtype.

    The products stand here as operations of their own, so that counters and activation checkpointing see them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, down: Tensor, fused: bool) -> Tensor:
        """x [E, N, D]; weight [E, D, 2F], the gate half first; down [E, F, D]. fused: SwiGLU inside the product."""
        keep = any(ctx.needs_input_grad)
        if fused:
            hidden, gate_up = expert_gate_up(x, weight, keep)
        else:
            gate_up = torch.bmm(x, weight)
            hidden = swiglu(gate_up.flatten(0, 1)).unflatten(0, gate_up.shape[:2])
        if keep:
            ctx.save_for_backward(x, weight, down, gate_up)
        return torch.bmm(hidden, down)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of what wants one."""
        x, weight, down, gate_up = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = torch.bmm(grad, down.mT)
        for_x, for_weight, for_down, _ = ctx.needs_input_grad
        flat = grad_hidden.flatten(0, 1), gate_up.flatten(0, 1)
        grad_gate_up, hidden = swiglu_backward(*flat, for_down)
        grad_gate_up = grad_gate_up.view_as(gate_up)
        return (
            torch.bmm(grad_gate_up, weight.mT) if for_x else None,
            torch.bmm(x.mT, grad_gate_up) if for_weight else None,
            torch.bmm(hidden.view_as(grad_hidden).mT, grad) if for_down else None,
            None,
        )
