"""Text padding as sequence lengths, for attention kernels that take no mask: nothing is copied, nothing is waited for.

Keys that count stand first in every row ([image ; text ; padding], `ops.attention`), so a mask is a number of keys per
row. Kernels of variable length want sequences that lie one behind the other without gaps. Here each row becomes two:
its S queries over the keys that count, and its padding as a sequence without queries. Keys and values stay where they
are, no score of padding is computed, and a key without a query has gradient zero.

All layers of a forward pass get the same mask, so what is made of it is made once (`of_each_mask`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """2*B sequences over rows that lie one behind the other: row 0, its padding, row 1, its padding, ...

    query_bounds, key_bounds: [2B + 1] int32, where each sequence begins, and the end. Lengths may be 0.
    longest_query, longest_key: upper bounds known from shapes alone, so that the host need not wait for the device.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int


def of_each_mask(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make(mask_BT, *sizes)``, whose last result is kept on the mask itself and goes with it.

    A mask that was written to since counts as another. Nothing is kept where a compiler or a CUDA graph records the
    call: what they replay must follow the mask's values.
    """

    @functools.wraps(make)
    def look_up(mask_BT: Tensor, *sizes: int) -> Any:
        if _is_recorded(mask_BT) or mask_BT.is_inference():  # the latter counts no writes
            return make(mask_BT, *sizes)
        key, name = (mask_BT._version, *sizes), f"_{make.__name__}"
        kept = getattr(mask_BT, name, None)
        if kept is None or kept[0] != key:
            kept = key, make(mask_BT, *sizes)
            setattr(mask_BT, name, kept)
        return kept[1]

    return look_up


def _is_recorded(mask_BT: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return mask_BT.is_cuda and torch.cuda.is_current_stream_capturing()


def key_lengths(mask_BT: Tensor) -> Tensor:
    """[B] int32: how many keys of each row count.

    Raises:
        RuntimeError: a key that counts stands behind one that does not. On a GPU this is an assertion of the device,
            which shows at the next wait for it, not here.
    """
    lengths_B = mask_BT.sum(1, dtype=torch.int32)
    first_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < lengths_B.unsqueeze(1)
    torch._assert_async(
        (first_BT == mask_BT).all(),
        "attention: keys that count must stand first in every row (padding at the end of the text); "
        "--attention-backend torch takes any mask",
    )
    return lengths_B


@of_each_mask
def as_sequences(mask_BT: Tensor, queries: int) -> Sequences:
    """Rows of ``queries`` queries and T keys each, of which the first ones count (errors as `key_lengths`)."""
    lengths_B, keys = key_lengths(mask_BT), mask_BT.shape[1]
    step = torch.arange(2 * lengths_B.shape[0] + 1, device=lengths_B.device, dtype=torch.int32)
    query_bounds = (step + 1) // 2 * queries
    key_bounds = step // 2 * keys
    key_bounds[1::2] += lengths_B
    return Sequences(query_bounds, key_bounds, queries, keys)


def computed_dtype(device_type: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in what autocast computes attention in; as they are without it.

    Autocast knows torch's attention, not a library's: there, norms hand over fp32 beside values in bf16.
    """
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)
