"""The time convention of the whole system, and everything that follows from it.

    x_sigma = (1 - sigma) * x0 + sigma * noise          sigma = 1: noise, sigma = 0: clean latent
    the network predicts  v = x0 - noise                (so the clean estimate is x_sigma + sigma * v)
    one Euler step        x += (sigma - sigma_next) * v

Source: diffusers' NucleusMoEImagePipeline negates the network's output before FlowMatchEulerDiscreteScheduler
adds (sigma_next - sigma) * output.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from megatron_nucleus.utils import rng
from megatron_nucleus.utils.config import knob

_LARGEST_EXPONENT = 700.0  # exp of 710 overflows; sigma is 0 to fp64 long before


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Noise levels in training: logit-normal around a mean that grows with the tokens, plus a uniform share."""

    sigma_mean_low: float = knob(0.5, "mean of logit(sigma) at sigma_tokens_low (paper)", unit="logit")
    sigma_mean_high: float = knob(1.15, "mean of logit(sigma) at sigma_tokens_high (paper)", unit="logit")
    sigma_tokens_low: int = knob(256, "image tokens at which sigma_mean_low holds", unit="tokens")
    sigma_tokens_high: int = knob(4096, "image tokens at which sigma_mean_high holds", unit="tokens")
    sigma_std: float = knob(1.0, "spread of logit(sigma); the paper does not give it", unit="logit")
    sigma_uniform_frac: float = knob(0.1, "share of samples whose sigma is uniform in (0, 1) (paper)")


def sigma_mean(config: FlowConfig, tokens: int) -> float:
    """Mean of logit(sigma) for an image of ``tokens`` tokens: linear through the two anchors, extrapolated."""
    slope = (config.sigma_mean_high - config.sigma_mean_low) / (
        config.sigma_tokens_high - config.sigma_tokens_low
    )
    return config.sigma_mean_low + slope * (tokens - config.sigma_tokens_low)


def sample_sigma(config: FlowConfig, seed: int, draws: tuple[int, ...], tokens: int) -> Tensor:
    """Training noise level of each draw: [B] fp32 in (0, 1), a pure function of (seed, draw, tokens)."""
    mean = sigma_mean(config, tokens)
    out = torch.empty(len(draws), dtype=torch.float64)
    normal = rng.normal_batch(seed, list(draws), "sigma", (1,))
    for i, draw in enumerate(draws):
        if rng.uniform(seed, draw, "sigma-mixture") < config.sigma_uniform_frac:
            out[i] = rng.uniform(seed, draw, "sigma-uniform")
        else:
            logit = mean + config.sigma_std * float(normal[i])
            out[i] = 1.0 / (1.0 + math.exp(min(-logit, _LARGEST_EXPONENT)))
    return out.clamp_(1e-6, 1.0 - 1e-6).float()


def sample_noise(seed: int, draws: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [B, *shape] fp32 on the CPU, a pure function of (seed, draw)."""
    return rng.normal_batch(seed, list(draws), "noise", shape)


def add_noise(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) * clean + sigma * noise, sigma broadcast over all but the first axis."""
    sigma = _per_sample(sigma_B, clean)
    return torch.lerp(clean, noise, sigma.expand_as(clean))


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict: x0 - noise."""
    return clean - noise


def clean_estimate(noisy: Tensor, velocity: Tensor, sigma_B: Tensor) -> Tensor:
    """x0 estimate = x_sigma + sigma * v."""
    return noisy + _per_sample(sigma_B, noisy) * velocity


def sampling_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels of a sampler: [steps + 1] fp64, from 1 down to 1/steps, then 0.

    shift: sigma -> shift*sigma / (1 + (shift-1)*sigma); 1.0 is the released model's schedule (FlowMatchEulerDiscrete).
    """
    sigma = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    sigma = shift * sigma / (1.0 + (shift - 1.0) * sigma)
    return torch.cat([sigma, sigma.new_zeros(1)])


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move ``x`` from sigma to sigma_next along the predicted velocity."""
    return x + (sigma - sigma_next) * velocity


def _per_sample(sigma_B: Tensor, like: Tensor) -> Tensor:
    return sigma_B.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))
