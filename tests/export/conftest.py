"""Tiny models and checkpoints for the tests of reading, converting and merging."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.export import native
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.types import TrainState
from tests.shapes import TINY as BASE

# 2F == D: a transposed expert matrix would pass every shape check.
TINY = dataclasses.replace(BASE, num_layers=5, capacity_factors=(0.0, 2.0, 2.0, 1.0, 2.0))
EXTRA = {
    "seed": 5,
    "codec": {"name": "dct", "coefficients": [8, 4, 4]},
    "text_encoder": {"name": "ngram"},
    "sampling": {"steps": 20, "guidance": 4.0, "shift": 1.0, "height": 64, "width": 64},
    "data": {"manifest_hash": "abc"},
    "git_commit": "0123",
    "versions": {"torch": torch.__version__},
}


class MomentumOnly:
    """The least a run's optimizer must offer: state tensors and scalars."""

    def __init__(self, model):
        self.state = {f"momentum.{n}": torch.randn_like(p) for n, p in model.named_parameters()}
        self.updates = 0

    def tensors(self):
        return self.state

    def scalars(self):
        return {"updates": self.updates}

    def load_scalars(self, scalars):
        self.updates = scalars["updates"]


def shape_of(**changes) -> ModelShape:
    shape = dict(dataclasses.asdict(TINY), **changes)
    if {"num_layers", "dense_moe_strategy"} & changes.keys():
        shape["capacity_factors"] = (1.0, 2.0, 1.0, 3.0, 2.0, 4.0)[: shape["num_layers"]]
    return ModelShape(**shape)


def random_model(shape: ModelShape, seed: int, dtype: torch.dtype = torch.float32) -> NucleusTransformer:
    """Every value random, norms and zero-initialised matrices too."""
    model = NucleusTransformer(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype)


def random_diffusers(shape: ModelShape, seed: int, **config):
    """A diffusers module of the same architecture, built from keywords written here by hand."""
    from diffusers import NucleusMoEImageTransformer2DModel

    torch.manual_seed(seed)
    model = NucleusMoEImageTransformer2DModel(
        patch_size=shape.patch_size,
        in_channels=shape.latent_channels * shape.patch_size**2,
        out_channels=shape.latent_channels,
        num_layers=shape.num_layers,
        attention_head_dim=shape.attention_head_dim,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        joint_attention_dim=shape.text_dim,
        axes_dims_rope=shape.axes_dims_rope,
        mlp_ratio=shape.mlp_ratio,
        dense_moe_strategy=shape.dense_moe_strategy,
        num_experts=shape.num_experts,
        moe_intermediate_dim=shape.moe_intermediate_dim,
        capacity_factors=list(shape.capacity_factors),
        use_sigmoid=shape.use_sigmoid,
        route_scale=shape.route_scale,
        **config,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save_run(run: Path, weights: NucleusTransformer, step: int, **extra) -> Path:
    """Save ``weights`` as a step of the run folder ``run``."""
    saver = Checkpointer(run / "checkpoints")
    state = TrainState(weights, MomentumOnly(weights), step, 8 * step)
    return saver.save(state, {**EXTRA, "model": native.shape_to_dict(weights.shape), **extra})


def flip_byte(path: Path) -> None:
    """Alter the last byte of a file, keeping its size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def make():
    """The functions above, for tests in this folder."""
    import types

    return types.SimpleNamespace(
        shape=shape_of,
        model=random_model,
        diffusers=random_diffusers,
        run=save_run,
        flip=flip_byte,
        extra=EXTRA,
    )


def sharded_model(shape: ModelShape, seed: int, ps: ParallelState) -> nn.Module:
    """`random_model` with its experts over the expert mesh, each rank a part of everything else."""
    model = random_model(shape, seed)
    for block in model.blocks:
        if block.is_moe:
            experts = block.moe.experts
            for name, parameter in list(experts.named_parameters()):
                spread = distribute_tensor(parameter.detach(), ps.expert_mesh["ep"], [Shard(0)])
                setattr(experts, name, nn.Parameter(spread))
            fully_shard(experts, mesh=ps.expert_mesh["expert_replicate", "efsdp"])
        fully_shard(block, mesh=ps.dense_mesh)
    fully_shard(model, mesh=ps.dense_mesh)
    return model
