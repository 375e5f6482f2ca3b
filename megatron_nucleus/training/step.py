"""What one micro-batch does: noise it, predict, sum the losses, add the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.losses import flow_loss_per_image, router_z_loss, wavelet_loss
from megatron_nucleus.training.step_report import StepLosses
from megatron_nucleus.types import Batch, Routing
from megatron_nucleus.utils.upload import upload

# Called with (flow loss of each image, noise levels, routings, grid) of a micro-batch, all detached.
Observe = Callable[[Tensor, Tensor, list[Routing], tuple[int, int]], None]


def forward_backward(
    model: NucleusTransformer,
    batch: Batch,
    run: RunConfig,
    share: float,
    world: int = 1,
    observe: Observe | None = None,
) -> StepLosses:
    """Add one micro-batch's gradient; returns its losses times ``share``, its part of this rank's images of a step.

    Gradients are summed over the ranks, so the loss is divided by ``world`` before. Noise and noise level of a
    sample depend on (seed, draw) alone.
    """
    clean_BSP, losses = batch.latents_BSP, run.losses
    seed, device = run.training.seed, clean_BSP.device
    noise_BSP = upload(flow.sample_noise(seed, batch.draws, tuple(clean_BSP.shape[1:])), device)
    sigma_B = upload(flow.sample_sigma(run.flow, seed, batch.draws, clean_BSP.shape[1]), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.training.bf16):
        noisy_BSP = flow.add_noise(clean_BSP, noise_BSP, sigma_B)
        velocity_BSP, routings = model(noisy_BSP, sigma_B, batch.text, batch.grid, return_routing=True)
    flow_B = flow_loss_per_image(velocity_BSP, flow.velocity_target(clean_BSP, noise_BSP))
    flow_part, z_part = flow_B.mean(), router_z_loss(routings)
    wavelet_part = torch.zeros((), device=device)
    if losses.wavelet_loss_coeff:
        estimate_BSP = flow.clean_estimate(noisy_BSP.float(), velocity_BSP.float(), sigma_B)
        wavelet_part = wavelet_loss(
            estimate_BSP, clean_BSP, batch.grid, model.shape.patch_size, losses.wavelet_band_weights
        )
    loss = flow_part + losses.moe_z_loss_coeff * z_part + losses.wavelet_loss_coeff * wavelet_part
    (loss * (share / world)).backward()
    if observe is not None:
        observe(flow_B.detach(), sigma_B, routings, batch.grid)
    return StepLosses(*(share * x.detach() for x in (loss, flow_part, z_part, wavelet_part)))
