"""Over many tensors at once: the sum of their squares, and one factor on all of them, as clipping needs them."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-6, 1e-6),
    torch.bfloat16: (8e-3, 1e-6),
    torch.float16: (1e-3, 1e-6),
}


def square_sum(*tensors: Tensor) -> Tensor:
    """Sum of the squares of all values, an fp64 scalar on the tensors' device. No gradient.

    Args:
        tensors: one or more, of one device; any floating dtype. A CPU's sums are formed in fp64, because its kernel
            adds one value after the other, which in fp32 loses 4e-4 at 1e6 equal values; a GPU's tree sums of one
            tensor stay in fp32.
    """
    accumulate = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(
        [t.detach() for t in tensors], 2, dtype=torch.promote_types(accumulate, tensors[0].dtype)
    )
    return torch.stack(norms).double().square().sum()


@torch.no_grad()
def scale_(factor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Multiply all tensors by ``factor`` in place, and return them.

    Args:
        factor: fp32 scalar (fp64 for fp64 tensors) on the tensors' device. It is not read on the host.
        tensors: any floating dtype; results are rounded to it once.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        torch._foreach_mul_(same, factor)
    return tensors
