"""Spreads a single-device model over ranks: experts, then compile, then activation checkpointing, then FSDP.

The model files know nothing of it. The order matters: the experts must be in their final place before FSDP cuts
them further, recomputation repeats what was compiled, and FSDP's hooks stay outside of both.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_nucleus.core.collectives import ShapeAgreement
from megatron_nucleus.core.models.init import init_rows
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.moe.dispatcher import AllToAllDispatcher
from megatron_nucleus.core.moe.exchange import open_exchange
from megatron_nucleus.core.moe.exchange_dispatcher import ExchangeDispatcher
from megatron_nucleus.core.parallel_state import ParallelConfig, ParallelState
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.core.transformer.block import TransformerBlock
from megatron_nucleus.utils.tensors import local


def parallelize(
    model: NucleusTransformer, config: ParallelConfig, parallel: ParallelState, *, bf16: bool = False
) -> NucleusTransformer:
    """Rewrite ``model`` in place for one rank of ``parallel``.

    Args:
        model: on any device; on meta nothing is allocated until `materialise`.
        bf16: gather weights in bfloat16; stored ones and gradients keep their dtype, gradients are reduced in fp32.
    """
    if parallel.world > 1:
        _share_experts(model, config, parallel, bf16)
    for block in model.blocks:
        if config.compile_blocks:
            _compile(block)
        if config.recompute_granularity != "none":
            block.forward = recomputing(block.forward, config.recompute_granularity)
    if parallel.world > 1:
        _shard(model, config, parallel, bf16)
    return model


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model from the meta device memory and initial weights; each rank draws what it holds.

    The values do not depend on the number of ranks (`core/models/init.py`).
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        init_rows(name, local(parameter.detach()), seed, parameter.shape, held_rows(parameter)[0])


def held_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """First and last + 1 of the rows (along the first axis) that this rank holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    where = (parameter.shape, parameter.device_mesh, parameter.placements)
    shape, offset = compute_local_shape_and_global_offset(*where)
    return offset[0], offset[0] + shape[0]


def expert_bytes_exchanged(model: NucleusTransformer) -> int:
    """Bytes that this rank handed to all-to-alls since the last call (`collectives.Traffic`)."""
    dispatchers = (block.moe.dispatcher for block in model.blocks if block.is_moe)
    return sum(
        d.traffic.take() for d in dispatchers if isinstance(d, (AllToAllDispatcher, ExchangeDispatcher))
    )


def _compile(block: TransformerBlock) -> None:
    """Compile a block around its routing: exchanges, FSDP's hooks and kept choices stay as they are written."""
    if block.is_moe:
        block.moe.forward = torch.compiler.disable(block.moe.forward)
        block.moe.shared_expert.forward = torch.compile(block.moe.shared_expert.forward)
    block.forward = torch.compile(block.forward)


def _share_experts(
    model: NucleusTransformer, config: ParallelConfig, parallel: ParallelState, bf16: bool
) -> None:
    """Experts become DTensors of their global shape, cut over ``ep``; tokens travel to them."""
    mesh = parallel.expert_mesh["ep"]
    exchange, dtype = None, torch.bfloat16 if bf16 else torch.float32
    if config.moe_token_dispatcher_type != "alltoall":
        exchange = open_exchange(
            config.moe_token_dispatcher_type,
            parallel.ep_group,
            parallel.control,
            experts=model.shape.num_experts,
            width=model.shape.width,
            device=parallel.device,
            dtype=dtype,
        )
    for block in model.blocks:
        if not block.is_moe:
            continue
        experts = block.moe.experts
        for name, parameter in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
        pace = {"chunks": config.moe_overlap_chunks, "overlap": config.moe_shared_expert_overlap}
        if exchange is not None:
            block.moe.dispatcher = ExchangeDispatcher(exchange, parallel.layout.ep, dtype=dtype, **pace)
        elif parallel.ep_group is not None:
            block.moe.dispatcher = AllToAllDispatcher(block.kernels, parallel.ep_group, **pace)
    if parallel.ep_group is not None:
        agreement = ShapeAgreement(parallel.control)
        model.register_forward_pre_hook(functools.partial(_check_shapes, agreement), with_kwargs=True)


def _check_shapes(agreement: ShapeAgreement, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Arguments as of `NucleusTransformer.forward`."""
    named = dict(zip(("latents_BSP", "sigma_B", "text", "grid"), args, strict=False)) | kwargs
    agreement.check(named["latents_BSP"].shape[0], tuple(named["grid"]))


def _shard(model: NucleusTransformer, config: ParallelConfig, parallel: ParallelState, bf16: bool) -> None:
    """FSDP2: experts over their own mesh, then each block, then the rest."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    expert_mesh = parallel.expert_mesh["expert_replicate", "efsdp"]
    keep = {"reshard_after_forward": config.reshard_after_forward, "mp_policy": policy}
    for block in model.blocks:
        if block.is_moe:
            _fsdp(block.moe.experts, mesh=expert_mesh, **keep)
        _fsdp(block, mesh=parallel.dense_mesh, **keep)
        register_fsdp_forward_method(block, "project_text")
    _fsdp(model, mesh=parallel.dense_mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "project_text")
    _prefetch(model)


def _fsdp(module: nn.Module, **settings) -> None:
    fully_shard(module, **settings)
    # Gradients are summed and never divided here: each rank's loss carries its share of the global batch. An
    # expert's gradient already sums over its ep group, so no division by the size of the mesh that is reduced
    # over would be right; and torch 2.13 divides twice where that mesh shards over one rank.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _prefetch(model: NucleusTransformer) -> None:
    """Gather the next weights while the present ones compute (the backward order is FSDP's own)."""
    blocks: list[TransformerBlock] = list(model.blocks)
    model.set_modules_to_forward_prefetch(blocks[:1])
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        ahead = [block.moe.experts] if block.is_moe else []
        block.set_modules_to_forward_prefetch(ahead + ([following] if following is not None else []))
