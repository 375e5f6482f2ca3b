"""Products of a matrix with its own transpose: half the tiles are computed, the other half is their mirror image.

Newton-Schulz makes two of its three products this way: the Gram matrix ``X X^T``, and its square, since ``G = G^T``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.launch import check, check_matrix, check_shape, power_of_two
from triton_ops.tuning import Tile, pick, shape_class

# A square tile of 128 takes 64 registers per thread for its sums at 8 warps, and 32 KiB of shared memory per stage in
# half precision: within an H100's 227 KiB. fp32 takes three products for each, and half the depth to fit them.
DEFAULT = Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
DEFAULT_FP32 = DEFAULT._replace(depth=32)
CANDIDATES = (
    DEFAULT,
    DEFAULT_FP32,
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 32, 8, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(64, 64, 64, 4, 4),
)


@triton.jit
def product_kernel(
    x,
    addend,
    out,
    R,
    C,
    alpha,
    beta,
    HAS_ADDEND: tl.constexpr,
    INTERPRET: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile (i, j), i >= j, of out = alpha * x @ x^T + beta * addend of one matrix, and its mirror image."""
    across = tl.cdiv(R, SIDE)
    # Tiles of one matrix. All matrices lie on the grid's first axis, the only one that takes over 65,535.
    tiles = across * (across + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles
    # Tiles are counted row by row: row i begins at i * (i + 1) / 2. The two corrections undo rounding of the root.
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= p).to(tl.int32)
    i -= (i * (i + 1) // 2 > p).to(tl.int32)
    j = p - i * (i + 1) // 2
    x += matrix * R * C
    r = i * SIDE + tl.arange(0, SIDE)
    c = j * SIDE + tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for first in range(0, C, DEPTH):
        d = first + tl.arange(0, DEPTH)
        left = tl.load(x + r[:, None] * C + d[None, :], mask=(r < R)[:, None] & (d < C)[None, :], other=0)
        right = tl.load(x + c[:, None] * C + d[None, :], mask=(c < R)[:, None] & (d < C)[None, :], other=0)
        if INTERPRET:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, tl.trans(right), total, input_precision="tf32x3")
    total *= alpha
    place = matrix * R * R + r[:, None] * R + c[None, :]
    inside = (r < R)[:, None] & (c < R)[None, :]
    if HAS_ADDEND:
        total += beta * tl.load(addend + place, mask=inside, other=0).to(tl.float32)
    value = total.to(out.dtype.element_ty)
    tl.store(out + place, value, mask=inside)
    if i != j:
        mirror = matrix * R * R + c[:, None] * R + r[None, :]
        tl.store(out + mirror, tl.trans(value), mask=(c < R)[:, None] & (r < R)[None, :])


def tile_for(x: Tensor) -> Tile:
    """Tile for matrices ``x`` [n, R, C]."""
    return pick("symmetric_product", shape_of(x), default_tile(x.dtype), x.device)


def shape_of(x: Tensor) -> str:
    """Shape class; how many matrices there are does not count."""
    return shape_class(x.dtype, about={}, exactly={"R": x.shape[1], "C": x.shape[2]})


def default_tile(dtype: torch.dtype) -> Tile:
    """The tile where none was measured."""
    return DEFAULT_FP32 if dtype == torch.float32 else DEFAULT


def launch(x: Tensor, addend: Tensor | None, alpha: float, beta: float, out: Tensor, tile: Tile) -> None:
    """`symmetric_product` with a given tile (rows = columns); nothing may be empty."""
    n, R, C = x.shape
    side = min(tile.rows, max(16, power_of_two(R)))  # 16: the least side of a product on tensor cores
    depth = min(tile.depth, max(16, power_of_two(C)))
    across = triton.cdiv(R, side)
    product_kernel[(n * (across * (across + 1) // 2),)](
        x,
        x if addend is None else addend,
        out,
        R,
        C,
        alpha,
        beta,
        HAS_ADDEND=addend is not None,
        INTERPRET=triton.knobs.runtime.interpret,
        SIDE=side,
        DEPTH=depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@torch.library.custom_op("triton_ops::symmetric_product", mutates_args=("out",))
def symmetric_product(x: Tensor, addend: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """``out = alpha * x @ x^T + beta * addend`` for every matrix of a stack; sums in fp32, no gradient.

    Args:
        x: [n, R, C]. addend: [n, R, R], symmetric: only its lower triangle is read. None = nothing is added.
        out: [n, R, R], all of it is written; must not share memory with x or addend.
    """
    if x.dim() != 3:
        raise ValueError(f"symmetric_product: x must be [n, R, C], got {list(x.shape)}")
    n, R, _ = x.shape
    squares = {"out": out} | ({} if addend is None else {"addend": addend})
    check("symmetric_product", x=x, **squares)
    check_shape("symmetric_product", (n, R, R), **squares)
    for name, t in {"x": x, "out": out}.items():
        check_matrix("symmetric_product", name, t)
    if out.numel():
        launch(x, addend, alpha, beta, out, tile_for(x))


symmetric_product.register_fake(lambda x, addend, alpha, beta, out: None)


def newton_schulz(x: Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Apply ``s -> a*s + b*s^3 + c*s^5`` to the singular values, for every (a, b, c).

    Args:
        x: [n, R, C] with R <= C, largest singular value at most 1; used as work space.

    Returns:
        [n, R, C]; may share memory with x. Multiplications, as a share of three full products' and without the
        tiles on the diagonal: ``(3*C + R) / (4*C + 2*R)``, two thirds where R = C.
    """
    n, R, _ = x.shape
    gram, poly, other = x.new_empty(n, R, R), x.new_empty(n, R, R), torch.empty_like(x)
    for a, b, c in coefficients:
        symmetric_product(x, None, 1.0, 0.0, gram)
        symmetric_product(gram, gram, c, b, poly)
        torch.baddbmm(x, poly, x, beta=a, out=other)
        x, other = other, x
    return x
