"""Which tokens of a picture the experts choose, at several noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.inference.sampler import sample_latents, stack_text
from megatron_nucleus.types import TextKV

SIGMAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)


class Allocation(NamedTuple):
    """Choices of the experts of every MoE layer.

    layers: numbers of the MoE blocks. sigmas: noise levels. taken: bool [layers, sigmas, E, h, w], True where the
    expert took the token.
    """

    layers: tuple[int, ...]
    sigmas: tuple[float, ...]
    taken: Tensor

    def counts(self) -> Tensor:
        """How many experts took each token: int64 [layers, sigmas, h, w]."""
        return self.taken.sum(2)


class Example(NamedTuple):
    """A generated picture, the noisy pictures the model was shown, one per noise level, and its allocation."""

    prompt: str
    picture: Image.Image
    noisy: list[Image.Image]
    allocation: Allocation


@torch.no_grad()
def expert_allocation(
    model: NucleusTransformer,
    clean_BSP: Tensor,
    noise_BSP: Tensor,
    text: TextKV,
    grid: tuple[int, int],
    sigmas: Sequence[float] = SIGMAS,
) -> Allocation:
    """Route one picture at several noise levels.

    Args:
        clean_BSP: packed latents of the picture, B = 1. noise_BSP: noise to mix in, as much as sigma says.
        text: keys and values of its prompt.

    Raises:
        ValueError: more than one picture.
    """
    if len(clean_BSP) != 1:
        raise ValueError(f"expert_allocation looks at one picture, got {len(clean_BSP)}")
    noisy_BSP, sigma_B = _noisy(clean_BSP, noise_BSP, sigmas)
    dtype = next(model.parameters()).dtype
    texts = stack_text([text] * len(sigmas))
    _, routings = model(noisy_BSP.to(dtype), sigma_B, texts, grid, return_routing=True)
    layers = tuple(i for i in range(model.shape.num_layers) if model.shape.is_moe(i))
    B, S, E = len(sigmas), grid[0] * grid[1], model.shape.num_experts
    taken = torch.zeros(len(layers), B, E, S, dtype=torch.bool)
    for layer, routing in enumerate(routings):
        taken[layer].scatter_(2, routing.index_BEC.cpu(), True)
    return Allocation(layers, tuple(sigmas), taken.view(len(layers), B, E, *grid))


def _noisy(clean_BSP: Tensor, noise_BSP: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    sigma_B = torch.tensor(list(sigmas), dtype=torch.float32, device=clean_BSP.device)
    n = len(sigma_B)
    return flow.add_noise(clean_BSP.expand(n, -1, -1), noise_BSP.expand(n, -1, -1), sigma_B), sigma_B


def allocation_example(
    pipeline: Pipeline, prompt: str, seed: int = 0, sigmas: Sequence[float] = SIGMAS
) -> Example:
    """Draw a picture with the pipeline's defaults, then mix its own starting noise back in and route it."""
    config = pipeline.settings()
    noise_BSP, grid = pipeline.noise([seed], config.height, config.width)
    positive = pipeline.project(pipeline.text_encoder.encode([prompt]), grid)
    negative = pipeline.project(pipeline.text_encoder.encode([""]), grid)
    clean_BSP = sample_latents(
        pipeline.model, noise_BSP, positive, negative, grid, config.steps, config.guidance, config.shift
    )
    allocation = expert_allocation(pipeline.model, clean_BSP, noise_BSP, positive, grid, sigmas)
    noisy = pipeline.decode(_noisy(clean_BSP, noise_BSP, sigmas)[0], grid)
    return Example(prompt, pipeline.decode(clean_BSP, grid)[0], noisy, allocation)
