"""Text padding as sequence lengths, for attention kernels that take no mask: nothing is copied, nothing is waited for.

Keys that count stand first in every row ([image ; text ; padding], `ops.attention`), so a mask is a number of keys per
row. Kernels of variable length want sequences that lie one behind the other without gaps. Here each row becomes two:
its S queries over the keys that count, and its padding as a sequence without queries. Keys and values stay where they
are, no score of padding is computed, and a key without a query has gradient zero.
"""

from __future__ import annotations

from typing import NamedTuple

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


def as_sequences(lengths_B: Tensor, queries: int, keys: int) -> Sequences:
    """Rows of ``queries`` queries and ``keys`` keys each, of which the first ``lengths_B`` [B] int32 count."""
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
