"""Expert choice in the words of libraries that move tokens by a short list of experts per token.

Such a library takes ``topk_idx`` [T, K], the experts of each token, with K of 32 at most and -1 for an empty place. A
token of expert choice may be picked by any number of experts. So the experts are cut into rounds of neighbours; in
the round of experts first..last, column j stands for expert first + j and holds its number where it picked the token,
else -1. Nothing is cut off, and K does not depend on the data. Neighbours stay in one round because they live on one
rank: the library sends a token once to a rank, however many of its experts want it.

What comes back on the other side is fixed in size, too: every expert takes the same number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_COLUMNS = 32  # K that DeepEP's kernels take: one lane of a warp per column


def split_rounds(experts: int, most: int = MOST_COLUMNS) -> tuple[range, ...]:
    """Experts of every round: ceil(experts / most) runs of neighbours, as equal as they can be."""
    rounds = -(-experts // most)
    width = -(-experts // rounds)
    return tuple(range(first, min(first + width, experts)) for first in range(0, experts, width))


def round_choices(taken_TE: Tensor, weight_TE: Tensor, experts: range) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token in one round.

    Args:
        taken_TE: bool, whether the expert picked the token. weight_TE: its weight, 0 where it did not.

    Returns:
        (topk_idx [T, K] int64, -1 where the expert did not pick the token; topk_weights [T, K]); both contiguous.
    """
    here = slice(experts.start, experts.stop)
    number_K = torch.arange(experts.start, experts.stop, device=taken_TE.device)
    topk_idx = torch.where(taken_TE[:, here], number_K, -1)
    return topk_idx.contiguous(), weight_TE[:, here].contiguous()


def local_columns(experts: range, first: int, count: int) -> range:
    """Columns of a round that belong to this rank, which holds experts first .. first + count - 1; may be empty."""
    start, stop = max(experts.start, first), min(experts.stop, first + count)
    return range(start - experts.start, stop - experts.start) if start < stop else range(0)


def arrived_rows(topk_idx_MK: Tensor, columns: range, rows: int) -> Tensor:
    """Where each expert's rows stand among what arrived. Sizes do not depend on values, so nothing waits for them.

    Args:
        topk_idx_MK: arrived experts, negative where the column's expert did not pick the token. Every column of
            ``columns`` has exactly ``rows`` others among the tokens that arrived; what stands behind those may be
            anything, because the first ``rows`` are all there are.
        columns: `local_columns`.

    Returns:
        [len(columns), rows] int64 positions in [0, M), rising along each expert.
    """
    wanted_cM = topk_idx_MK[:, columns.start : columns.stop].t() >= 0
    # A stable sort of yes before no: positions of yes, in order.
    return (~wanted_cM).to(torch.uint8).sort(dim=1, stable=True).indices[:, :rows]
