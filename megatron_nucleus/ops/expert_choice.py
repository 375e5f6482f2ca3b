"""Expert choice: every expert takes its best C tokens of each image."""

from __future__ import annotations

import torch
from torch import Tensor

# (rtol, atol) every backend must meet against the reference below, forward and gradients.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 1e-6),
    torch.bfloat16: (1.6e-2, 1e-2),
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
        logits. The weights of one token sum to ``route_scale`` over the experts that took it. Gradients flow
        through the weights. Source: diffusers' ``NucleusMoELayer.forward``: scores are formed in fp32 and
        rounded to the logits' dtype before the choice.
    """
    logits_wide = logits_BSE.to(torch.promote_types(logits_BSE.dtype, torch.float32))
    scores_wide = torch.sigmoid(logits_wide) if use_sigmoid else torch.softmax(logits_wide, dim=-1)
    affinity_BES = scores_wide.to(logits_BSE.dtype).transpose(1, 2)
    score_BEC, index_BEC = torch.topk(affinity_BES, capacity, dim=-1)
    index_flat = index_BEC.flatten(1)
    # A token's sum runs over the experts in order: no atomics on a CPU, the same bits every time.
    total_BS = score_BEC.new_zeros(affinity_BES.shape[0], affinity_BES.shape[2])
    total_BS = total_BS.scatter_add(1, index_flat, score_BEC.flatten(1))
    total_BEC = total_BS.gather(1, index_flat).view_as(score_BEC)
    return index_BEC, score_BEC / (total_BEC + 1e-12) * route_scale
