"""Expert choice: every expert takes its best C tokens of each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.types import Routing


def capacity(factor: float, tokens: int, experts: int) -> int:
    """C, rows per expert and image: max(1, ceil(factor * tokens / experts)). Never rounded up further.

    Raises:
        ValueError: an expert would take more tokens than the image has.
    """
    rows = max(1, math.ceil(factor * tokens / experts))
    if rows > tokens:
        raise ValueError(
            f"capacity factor {factor} asks each of {experts} experts for {rows} tokens of an image that has {tokens}; "
            f"lower model.capacity_factors to at most {experts}"
        )
    return rows


class Router(nn.Module):
    """Scores every token for every expert from a token and the time embedding.

    In the published model it judges the *unmodulated* token (decoupled routing): modulated tokens would let the
    noise level's scale drive the choice instead of the content. Coupled routing (``model.decoupled_routing: false``),
    which judges the modulated token with the same parameters, is there to compare with.
    """

    def __init__(
        self, width: int, experts: int, factor: float, use_sigmoid: bool, route_scale: float, kernels: Kernels
    ):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(experts, 2 * width)
        )  # columns: time embedding first, then token
        self.factor, self.use_sigmoid, self.route_scale = factor, use_sigmoid, route_scale
        self.kernels = kernels

    def forward(self, judged_BSD: Tensor, temb_BD: Tensor) -> Routing:
        """judged_BSD: LN(x) before modulation, or after it. Scores are computed in fp32 and rounded to its dtype."""
        _, S, D = judged_BSD.shape
        # The time embedding is the same for all tokens of an image: its half of the product is formed once, and no
        # [B, S, 2D] is written.
        time_BE = nn.functional.linear(temb_BD, self.weight[:, :D])
        logits_BSE = nn.functional.linear(judged_BSD, self.weight[:, D:]) + time_BE.unsqueeze(1)
        rows = capacity(self.factor, S, self.weight.shape[0])
        index_BEC, weight_BEC = self.kernels.expert_choice(
            logits_BSE, rows, self.use_sigmoid, self.route_scale
        )
        return Routing(index_BEC, weight_BEC, logits_BSE.float())
