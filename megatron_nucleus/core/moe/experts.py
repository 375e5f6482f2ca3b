"""The routed experts: SwiGLU feed-forwards stored as two batched matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels


class Experts(nn.Module):
    """gate_up [E, D, 2F] (gate first) and down [E, F, D]: (in, out) order, as in the released checkpoint."""

    def __init__(self, experts: int, width: int, hidden: int, kernels: Kernels):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.kernels = kernels

    def forward(self, rows_END: Tensor) -> Tensor:
        """[E, N, D] -> [E, N, D], two batched matmuls with fixed shapes."""
        return self.kernels.expert_ffn(rows_END, self.gate_up, self.down)
