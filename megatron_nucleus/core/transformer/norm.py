"""RMSNorm with a learned weight; the modulated LayerNorm has no parameters and lives in `ops/norm.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels

EPS = 1e-6  # every norm of the model (diffusers source)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, variance in fp32."""

    def __init__(self, width: int, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, EPS)
