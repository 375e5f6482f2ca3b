"""Expert choice: every expert takes its best C tokens of each image."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) of every backend against the reference in fp64: |error| <= rtol * max|reference| + atol.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 1e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def select(logits_BSE: Tensor, capacity: int, use_sigmoid: bool, route_scale: float) -> tuple[Tensor, Tensor]:
    """Turn router logits into each expert's tokens and their weights.

    Args:
        logits_BSE: router output in the model's dtype.
        capacity: C, tokens every expert takes of each image, in [1, S].
        use_sigmoid: score an expert on its own (sigmoid) instead of against the others (softmax over E).
        route_scale: factor on the renormalised weights.

    Returns:
        ``(index_BEC, weight_BEC)``: int64 token positions in [0, S), best first; weights in the dtype of the
        logits. The weights of one token sum to ``route_scale`` over the experts that took it; they are 0 where
        all its scores there are too small for the dtype. Of equal scores any may be taken. Gradients flow through
        the weights. Source: diffusers' ``NucleusMoELayer.forward``: scores are formed in fp32 and
        rounded to the logits' dtype before the choice.
    """
    logits_wide = logits_BSE.to(torch.promote_types(logits_BSE.dtype, torch.float32))
    scores_wide = torch.sigmoid(logits_wide) if use_sigmoid else torch.softmax(logits_wide, dim=-1)
    affinity_BES = scores_wide.to(logits_BSE.dtype).transpose(1, 2)
    score_BEC, index_BEC = torch.topk(affinity_BES, capacity, dim=-1)
    # Scattered to distinct places and then summed over the experts: no atomics, the same bits every time.
    taken_BES = torch.zeros_like(affinity_BES, memory_format=torch.contiguous_format)
    total_B1S = taken_BES.scatter(2, index_BEC, score_BEC).sum(1, keepdim=True)
    total_BEC = total_B1S.expand_as(affinity_BES).gather(2, index_BEC) + 1e-12
    if total_BEC.dtype == torch.float16:
        total_BEC = total_BEC.masked_fill(total_BEC == 0, 1)  # 1e-12 is 0 there, and 0 / 0 no weight
    return index_BEC, score_BEC / total_BEC * route_scale
