"""Dense SwiGLU feed-forward: the early blocks' FFN and the shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels


class FeedForward(nn.Module):
    """down(silu(gate) * up); ``gate_up`` holds the gate's rows first, then up's (diffusers has them swapped)."""

    def __init__(self, width: int, hidden: int, kernels: Kernels):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.swiglu(self.gate_up(x)))
