"""Time embedding: sigma -> sinusoid -> MLP -> RMSNorm (diffusers `NucleusMoETimestepProjEmbeddings`)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels
from megatron_nucleus.core.transformer.norm import RMSNorm

TIME_SCALE = 1000.0
MAX_PERIOD = 10000.0


def sinusoid(sigma_B: Tensor, width: int) -> Tensor:
    """[B] in [0, 1] -> [B, width] fp32: cosines first, then sines, of 1000*sigma at width/2 frequencies."""
    half = width // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=sigma_B.device) / half
    angle = TIME_SCALE * (sigma_B.float()[:, None] * torch.exp(exponent)[None])
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class TimeEmbedding(nn.Module):
    """sigma [B] -> temb [B, D]; the MLP is four times as wide as the model."""

    def __init__(self, width: int, kernels: Kernels):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)
        self.norm = RMSNorm(width, kernels)

    def forward(self, sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
        """sigma is rounded to ``dtype`` first, as the released model was run."""
        features = sinusoid(sigma_B.to(dtype), self.width).to(dtype)
        return self.norm(self.linear_2(F.silu(self.linear_1(features))))
