"""Orthogonalisation of many matrices at once by Newton-Schulz, as Muon needs it."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol. Wide in half
# precision, and for singular values of one size at that: an error at one of 0.01 grows 100-fold over the steps.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (4e-2, 4e-2),
    torch.float16: (4e-3, 4e-3),
}

# One step maps every singular value s (the largest is at most 1) to a*s + b*s^3 + c*s^5.
# Five or more steps: Keller Jordan's coefficients; values above 0.003 end in [0.68, 1.21].
# Four and three steps: the minimax quintics of Polar Express (arXiv 2505.16932), computed for values in
# [0.003, 1.02] and [0.01, 1.02] with 1 % between steps for rounding; they end in [0.78, 1.22] and [0.71, 1.29].
JORDAN = (3.4445, -4.7750, 2.0315)
MINIMAX = {
    3: ((7.942388, -22.287293, 15.823857), (3.623094, -2.662054, 0.514067), (2.686905, -1.971038, 0.440643)),
    4: (
        (8.221763, -23.346858, 16.633755),
        (4.012115, -2.930303, 0.543126),
        (3.507991, -2.581028, 0.505327),
        (2.529413, -1.844704, 0.427668),
    ),
}
NORM_FLOOR = 1e-7  # a zero gradient must stay a zero update; the value of torch.optim.Muon


def coefficients(steps: int) -> tuple[tuple[float, float, float], ...]:
    """Quintic coefficients (a, b, c) of each of ``steps`` Newton-Schulz steps."""
    return MINIMAX.get(steps) or (JORDAN,) * steps


def orthogonalize(stack_nrc: Tensor, steps: int, overwrite: bool = False) -> Tensor:
    """Orthogonalise every matrix of a stack: its polar factor, with singular values about 1.

    Args:
        stack_nrc: [n, r, c] with r <= c (the Gram matrix is r x r), fp32, bf16, fp16 or fp64. No gradient.
        steps: Newton-Schulz steps, at least 3; see `coefficients`.
        overwrite: the stack may be used as work space, which saves a copy of it.

    Returns:
        [n, r, c] of the same dtype; shares memory with the input only if ``overwrite``.
    """
    x = normalise(stack_nrc, overwrite)
    n, r, _ = x.shape
    gram, poly, other = x.new_empty(n, r, r), x.new_empty(n, r, r), torch.empty_like(x)
    for a, b, c in coefficients(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, poly, x, beta=a, out=other)
        x, other = other, x
    return x


def normalise(stack_nrc: Tensor, overwrite: bool) -> Tensor:
    """Every matrix divided by its Frobenius norm, contiguous: no singular value is above 1 then."""
    accumulate = torch.promote_types(stack_nrc.dtype, torch.float32)
    norm = torch.linalg.vector_norm(stack_nrc, dim=(1, 2), keepdim=True, dtype=accumulate)
    inverse = norm.clamp_(min=NORM_FLOOR).reciprocal_()
    own = overwrite and stack_nrc.is_contiguous()
    out = stack_nrc if own else torch.empty_like(stack_nrc, memory_format=torch.contiguous_format)
    return torch.mul(stack_nrc, inverse, out=out)
