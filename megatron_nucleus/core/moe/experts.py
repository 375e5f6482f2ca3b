"""The routed experts: SwiGLU feed-forwards stored as two batched matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.moe.dispatcher import LocalDispatcher
from megatron_nucleus.utils.tensors import local


class Experts(nn.Module):
    """gate_up [E, D, 2F] (gate first) and down [E, F, D]: (in, out) order, as in the released checkpoint.

    Over several ranks the parameters keep their global shape and each rank computes with its e experts.
    """

    def __init__(self, experts: int, width: int, hidden: int, kernels: Kernels):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.kernels = kernels

    def forward(self, pieces: tuple[Tensor, ...], dispatcher: LocalDispatcher) -> tuple[Tensor, ...]:
        """Each piece, [e, N, D] once it has arrived: two batched matmuls with fixed shapes, and back it goes."""
        gate_up, down = local(self.gate_up), local(self.down)
        return tuple(
            dispatcher.give_back(self.kernels.expert_ffn(dispatcher.arrive(piece), gate_up, down))
            for piece in pieces
        )
