"""Small tensor helpers that need no process group."""

from __future__ import annotations

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (differentiable, same storage); a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
