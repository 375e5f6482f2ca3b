"""Routings as the router gives them, of random logits."""

from __future__ import annotations

import torch

from megatron_nucleus.types import Routing


def routing(B, S, C, seed, experts=5):
    """Random choices with weights renormalised per token, as the router gives them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, S, experts, generator=generator) * 2 + 30  # a large mean must not cost digits
    score, index = logits.softmax(-1).transpose(1, 2).topk(C, dim=-1)
    total = torch.zeros(B, S).scatter_add_(1, index.flatten(1), score.flatten(1))
    weight = 2.5 * score / total.gather(1, index.flatten(1)).view_as(score)
    return Routing(index, weight, logits)
