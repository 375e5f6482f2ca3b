"""Moves the chosen tokens to their experts and the experts' rows back.

Expert choice gives every expert the same number of rows of every image, so all shapes are known before the router
has run: one gather in destination order, no counts, no host sync, no padding. A dispatcher over several ranks
exchanges the same [E, B*C, D] block with equal splits behind these two methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.types import Routing


class LocalDispatcher:
    """All experts on this rank."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels

    def dispatch(self, x_BSD: Tensor, routing: Routing) -> Tensor:
        """Rows in destination order: [E, B*C, D], expert-major, then image, then rank of the token's score."""
        E = routing.index_BEC.shape[1]
        D = x_BSD.shape[-1]
        rows = self.kernels.moe_gather(x_BSD.reshape(-1, D), _flat_index(routing, x_BSD.shape[1]))
        return rows.view(E, -1, D)

    def combine(self, base_BSD: Tensor, rows_END: Tensor, routing: Routing) -> Tensor:
        """base + the sum over experts of weight * row, back on the tokens. Weights are applied on the token side."""
        D = base_BSD.shape[-1]
        weight = routing.weight_BEC.transpose(0, 1).reshape(-1)
        index = _flat_index(routing, base_BSD.shape[1])
        out = self.kernels.moe_combine(base_BSD.reshape(-1, D), rows_END.reshape(-1, D), weight, index)
        return out.view_as(base_BSD)


def _flat_index(routing: Routing, tokens: int) -> Tensor:
    """[E*B*C] positions in the flattened [B*S] tokens."""
    index_BEC = routing.index_BEC
    start_B11 = torch.arange(index_BEC.shape[0], device=index_BEC.device).view(-1, 1, 1) * tokens
    return (index_BEC + start_B11).transpose(0, 1).reshape(-1)
