"""Matrix products with 8-bit operands, emulated in plain torch: the reference of every FP8 backend.

Operands are divided by a scale, rounded to an 8-bit float and multiplied back, then multiplied in fp32; a tensor core
adds up the same 8-bit values. What differs is the order of additions (and, on Hopper, sums kept in fewer bits).
It runs anywhere and is slow: it shows what FP8 does to numbers, not how fast it is.

Largest values and steps of the two formats (OCP OFP8, arXiv 2209.05433):

    format   fits              largest   relative step   smallest step
    e4m3     values, weights   448       2^-3            2^-9
    e5m2     gradients         57344     2^-2            2^-16
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nucleus.ops.swiglu import swiglu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
WHOLE = (0, 0)
# Scales of smaller blocks would be subnormal in fp32, which GPUs may flush to zero. A block of zeros has scale 1.
_SMALLEST_SCALE = 2.0**-120


class Recipe(NamedTuple):
    """How operands are scaled.

    tokens, weights: rows and columns of a block that shares one scale, columns running along the sum of the product;
    0 = all of the matrix. gradient: format of gradients of the output. power_of_two: scales are rounded up to one.
    """

    tokens: tuple[int, int]
    weights: tuple[int, int]
    gradient: torch.dtype
    power_of_two: bool


# What the libraries' recipes of these names do (Transformer Engine 2.20, torchao 0.18).
RECIPES = {
    "current": Recipe(WHOLE, WHOLE, E5M2, False),
    "rowwise": Recipe((1, 0), (1, 0), E4M3, True),
    "blockwise": Recipe((1, 128), (128, 128), E4M3, True),
    "mxfp8": Recipe((1, 32), (1, 32), E4M3, True),
}


def quantise(
    x: Tensor, block: tuple[int, int], dtype: torch.dtype = E4M3, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """Round ``x`` to an 8-bit format, each block by a scale of its own.

    Args:
        x: [..., R, C] of any floating dtype. A NaN or an infinity makes NaNs of its whole block, so that a step that
            met one is noticed by its loss.
        block: rows and columns that share a scale, 0 = all. Blocks at the edges may be smaller.
        power_of_two: round scales up to a power of two: `dequantise` is then exact in bfloat16, too.

    Returns:
        values [..., R, C] in ``dtype`` and fp32 scales [..., blocks of rows, blocks of columns]. Of every value
        |x - value*scale| <= max(|x| * relative step, scale * smallest step) / 2.
    """
    if x.numel() == 0:
        return x.to(dtype), x.new_zeros(0, dtype=torch.float32)
    blocks = _blocks(x.float(), block)
    largest = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    scale = largest / LARGEST[dtype]
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        rounded = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), rounded, scale)
    scale = torch.where(largest == 0, 1.0, scale.clamp(min=_SMALLEST_SCALE))
    values = (blocks / scale).clamp(-LARGEST[dtype], LARGEST[dtype])  # the cast makes NaN of what is beyond
    return _whole(values, x.shape).to(dtype), scale.squeeze(-1).squeeze(-2)


def dequantise(
    values: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantise` but for the rounding, [..., R, C] in ``dtype``."""
    if values.numel() == 0:
        return values.to(dtype)
    blocks = _blocks(values.to(dtype), block)
    return _whole(blocks * scale.to(dtype).unsqueeze(-2).unsqueeze(-1), values.shape)


def matmul(a: Tensor, b: Tensor, recipe: str) -> Tensor:
    """``a @ b`` with 8-bit operands, and 8-bit operands in its backward pass.

    Each of the three products scales its operands along its own sum, as hardware needs it.

    Args:
        a: [..., M, K] activations. b: [..., K, N] weights, the same leading axes; a matrix has scales of its own.
            Where a and b differ in dtype, b is rounded to that of a first.
        recipe: key of `RECIPES`.

    Returns:
        [..., M, N] in the dtype of ``a``.
    """
    return _Matmul.apply(a, b.to(a.dtype), RECIPES[recipe])


def linear(x: Tensor, weight_MD: Tensor, recipe: str) -> Tensor:
    """``x @ weight^T`` with 8-bit operands. x: [..., D]; returns [..., M]. Under autocast x is cast as elsewhere."""
    x = _autocast(x)
    return matmul(x.reshape(-1, x.shape[-1]), weight_MD.t(), recipe).unflatten(0, x.shape[:-1])


def expert_ffn(rows_END: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor, recipe: str) -> Tensor:
    """`ops.experts.expert_ffn` with 8-bit operands in both products; the activation between them is not rounded."""
    hidden_ENF = swiglu(matmul(_autocast(rows_END), gate_up_EDF2, recipe))
    return matmul(hidden_ENF, down_EFD, recipe)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.recipe = recipe
        two = recipe.power_of_two
        out = _product(_rounded(a, recipe.tokens, E4M3, two), _rounded(b.mT, recipe.weights, E4M3, two).mT)
        return out.to(a.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        recipe, two = ctx.recipe, ctx.recipe.power_of_two
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_MN = _rounded(grad, recipe.tokens, recipe.gradient, two)
            grad_a = _product(grad_MN, _rounded(b, recipe.weights, E4M3, two).mT).to(a.dtype)
        if ctx.needs_input_grad[1]:
            grad_NM = _rounded(grad.mT, recipe.tokens, recipe.gradient, two)
            grad_b = _product(_rounded(a.mT, recipe.tokens, E4M3, two), grad_NM.mT).to(b.dtype)
        return grad_a, grad_b, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """fp32, also under autocast, which would round the operands a second time. A compiler's backward is under it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _rounded(x: Tensor, block: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> Tensor:
    return dequantise(*quantise(x, block, dtype, power_of_two), block)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[..., R, C] -> [..., blocks of rows, rows, blocks of columns, columns], edges filled with zeros."""
    rows, columns = block[0] or x.shape[-2], block[1] or x.shape[-1]
    missing = (-x.shape[-1] % columns, -x.shape[-2] % rows)
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_blocks`."""
    x = blocks.flatten(-2).flatten(-3, -2)
    return x[..., : shape[-2], : shape[-1]]
