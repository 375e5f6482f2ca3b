"""The training objective: rectified-flow velocity MSE and the router's z-loss."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_nucleus.types import Routing
from megatron_nucleus.utils.config import knob


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses beside the velocity MSE, whose weight is 1."""

    moe_z_loss_coeff: float = knob(5e-7, "weight of the router z-loss (paper)")


def flow_loss(velocity_BSP: Tensor, target_BSP: Tensor) -> Tensor:
    """Mean squared error over every latent value of the batch, fp32 scalar."""
    return (velocity_BSP.float() - target_BSP.float()).square().mean()


def router_z_loss(routings: list[Routing]) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, summed over the MoE layers: fp32 scalar (ST-MoE, arXiv 2202.08906).

    Keeps router logits small; zero for a model without MoE layers.
    """
    if not routings:
        return torch.zeros(())
    return torch.stack([r.logits_BSE.float().logsumexp(-1).square().mean() for r in routings]).sum()
