"""Tensors that may be spread over ranks (`torch.distributed.tensor.DTensor`), without a process group.

One is known by its methods: importing the class takes half a second, which a single process need not pay.
"""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over a mesh of ranks."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (differentiable, same storage); a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor
