"""A tiny model over any grid of ranks, a fixed global batch, and a few optimizer steps on it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_nucleus.core.collectives import gather_rows
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.clip import local_square_sum, scale_gradients
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import (
    ParallelConfig,
    ParallelState,
    create_groups,
    make_layout,
    single_process,
)
from megatron_nucleus.core.parallelize import expert_bytes_exchanged, materialise, parallelize
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils import rng
from tests.shapes import TINY

SHAPE = dataclasses.replace(TINY, num_layers=3, num_experts=8, capacity_factors=(0.0, 2.0, 3.0))
IMAGES, GRID, TEXT_TOKENS = 16, (3, 4), 5


class Outcome(NamedTuple):
    """losses and norms of every step; gradients of the first step; weights after the last; bytes of one step."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    all_to_all_bytes: int


def join(config: ParallelConfig, shape: ModelShape = SHAPE) -> ParallelState:
    """The grid over the ranks of the default process group, or one process without it."""
    cpu = torch.device("cpu")
    if not dist.is_initialized():
        return single_process(cpu, shape.num_experts)
    layout = make_layout(
        dist.get_world_size(),
        experts=shape.num_experts,
        ep=config.expert_model_parallel_size,
        replicate=config.data_parallel_replicate_size,
    )
    return create_groups(layout, cpu, dist.get_rank(), 60.0)


def build(
    parallel: ParallelState, config: ParallelConfig, shape: ModelShape = SHAPE, bf16: bool = False
) -> NucleusTransformer:
    """The model with every weight random, so that nothing is the identity and no router score is a near-tie."""
    with torch.device("meta"):
        model = NucleusTransformer(shape)
    parallelize(model, config, parallel, bf16=bf16)
    materialise(model, parallel.device, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = rng.generator(1, 0, name)
            if name.endswith("router.weight"):
                put(parameter, torch.randn(parameter.shape, generator=generator) * 0.5)
            elif "modulation" in name or "image_out" in name or name.endswith("bias"):
                put(parameter, torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def put(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fill this rank's part of a parameter from the whole tensor."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    where = (parameter.shape, parameter.device_mesh, parameter.placements)
    size, offset = compute_local_shape_and_global_offset(*where)
    parameter.to_local().copy_(full[offset[0] : offset[0] + size[0]])


def whole(tensor: torch.Tensor) -> np.ndarray:
    """The full values of a tensor, on every rank."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy().copy()


def run_steps(
    settings: dict, *, steps: int = 3, accumulation: int = 1, shape: ModelShape = SHAPE, lr: float = 1e-3
) -> Outcome:
    """Train on a batch of `IMAGES` images that is cut over the ranks; returns the same on every rank."""
    config = ParallelConfig(**settings)
    parallel = join(config, shape)
    model = build(parallel, config, shape)
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr, clip_grad=0.5))
    group = dist.group.WORLD if parallel.world > 1 else None
    losses, norms, gradients, sent = [], [], {}, 0
    for step in range(steps):
        optimizer.zero_grad()
        loss = _forward_backward(model, parallel, step, accumulation)
        params = list(optimizer.params.values())
        row = torch.stack([local_square_sum(params), loss.double()])
        square_sum, total = gather_rows(row, group).sum(0)
        losses.append(float(total) / parallel.world)
        norms.append(float(square_sum.sqrt()))
        sent = expert_bytes_exchanged(model)
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in optimizer.params.items()}
        scale_gradients(params, square_sum.sqrt().float(), 0.5)
        optimizer.step(lr)
    weights = {n: whole(p) for n, p in model.named_parameters()}
    return Outcome(losses, norms, gradients, weights, sent)


def _forward_backward(
    model: NucleusTransformer, parallel: ParallelState, step: int, accumulation: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens, width = GRID[0] * GRID[1], SHAPE.patch_channels
    x = torch.randn(IMAGES, tokens, width, generator=generator)
    sigma = torch.rand(IMAGES, generator=generator)
    text = torch.randn(IMAGES, TEXT_TOKENS, SHAPE.text_dim, generator=generator)
    target = torch.randn(IMAGES, tokens, width, generator=generator)
    share = IMAGES // parallel.world
    mine = torch.arange(parallel.rank * share, (parallel.rank + 1) * share)
    loss_sum = torch.zeros(())
    for number, part in enumerate(mine.chunk(accumulation)):
        if parallel.world > 1:
            model.set_requires_all_reduce(number == accumulation - 1)
        velocity, routings = model(x[part], sigma[part], TextFeatures(text[part]), GRID, return_routing=True)
        z_loss = sum(r.logits_BSE.logsumexp(-1).square().mean() for r in routings)
        loss = ((velocity - target[part]).square().mean() + 1e-3 * z_loss) / accumulation
        (loss / parallel.world).backward()
        loss_sum += loss.detach()
    return loss_sum
