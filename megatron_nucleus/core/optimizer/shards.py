"""What a rank holds of a parameter. A sharded parameter is a `torch.distributed.tensor.DTensor`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from megatron_nucleus.utils.tensors import is_sharded
from megatron_nucleus.utils.tensors import local as own_part


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory; a plain tensor is its own part. For `torch.no_grad`.

    Arithmetic value by value runs on these: a DTensor's own operations cost more than small updates do.
    """
    return [own_part(t) for t in tensors]


def first_value(tensor: Tensor) -> int:
    """Position, in the whole tensor laid out row by row, of the first value that this rank holds.

    Those that follow are neighbours there, too: ranks hold blocks of rows.
    """
    if not is_sharded(tensor) or not own_part(tensor).numel():
        return 0
    # Imported here: the module takes half a second, which a single process need not pay.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    where = (tensor.shape, tensor.device_mesh, tensor.placements)
    _, offset = compute_local_shape_and_global_offset(*where)
    return offset[0] * math.prod(tensor.shape[1:])


def in_blocks_of_rows(tensor: Tensor) -> bool:
    """Whether this rank's part is whole neighbouring rows, in memory as in the whole tensor."""
    if not own_part(tensor).is_contiguous():
        return False
    return not is_sharded(tensor) or all(p.is_replicate() or p.dim == 0 for p in tensor.placements)


def copies(tensor: Tensor) -> int:
    """How many ranks hold the very values that this rank holds of ``tensor``."""
    if not is_sharded(tensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(axis) for axis, p in enumerate(tensor.placements) if p.is_replicate())


def is_cut(tensor: Tensor) -> bool:
    """Whether the matrices (last two axes) of ``tensor`` may lie on several ranks, so that none can work alone.

    Experts are spread over their leading axis and stay whole. So does what a mesh of a single rank holds.
    """
    if not is_sharded(tensor) or tensor.device_mesh.size() == 1:
        return False
    return any(not p.is_replicate() and p.dim >= tensor.ndim - 2 for p in tensor.placements)
