"""Moving token rows to the experts and back: gather, and weighted scatter-add.

Every expert takes exactly C tokens of each image, so both operations have fixed shapes: T = B*S tokens and
N = E*B*C rows in expert-major order (README, "Expert choice").
"""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def gather_rows(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """Copy the rows ``index_N`` of ``x_TD``.

    Args:
        x_TD: tokens, any floating dtype.
        index_N: int64 positions in [0, T); repeats are allowed, tokens may be missing.

    Returns:
        [N, D] in the dtype of ``x_TD``. Gradient: rows of the same token add up (here in row order on a CPU and
        in no fixed order on a GPU; the triton backend always adds in row order).
    """
    # index_select's gradient is index_add; that of x[index] is index_put, several times slower on a CPU.
    return x_TD.index_select(0, index_N)


def combine_rows(base_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, index_N: Tensor) -> Tensor:
    """Add weighted rows onto the tokens they came from: ``base[index[n]] += weight[n] * rows[n]``.

    Args:
        base_TD: what the rows are added to (the shared expert's output); left unchanged.
        rows_ND: expert outputs, dtype of ``base_TD``.
        weight_N: routing weight of each row, any floating dtype.
        index_N: int64 token of each row, in [0, T).

    Returns:
        [T, D] in the dtype of ``base_TD``; products and sums are formed in fp32 (fp64 for fp64) and rounded
        once, in the order that `gather_rows` has backward. Differentiable in base, rows and weight.
    """
    wide = torch.promote_types(base_TD.dtype, torch.float32)
    product_ND = rows_ND.to(wide) * weight_N.to(wide).unsqueeze(-1)
    return base_TD.to(wide).index_add(0, index_N, product_ND).to(base_TD.dtype)
