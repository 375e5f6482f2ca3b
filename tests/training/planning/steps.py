"""Real training steps on a CPU, in one process or as one of several ranks, and what they allocated."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_nucleus.core.kernels import KernelConfig, resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS, ModelShape
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.optimizer import STORED_DTYPES, OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import ParallelConfig, make_layout
from megatron_nucleus.core.parallelize import materialise, parallelize
from megatron_nucleus.core.precision.precision import PrecisionConfig, apply_precision
from megatron_nucleus.training.losses import flow_loss_per_image, router_z_loss
from megatron_nucleus.training.planning.ledger import FUSABLE, MicroBatch, plain_operations
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.plan import STORED_BYTES
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.tensors import local
from tests.core.parallel_cases import join
from tests.training.planning.allocations import count_allocations

SHAPE = PRESETS["demo"]
# Twice as wide, with narrow experts: weights, gradients and optimizer state are most of the memory.
WIDE = dataclasses.replace(SHAPE, num_attention_heads=8, num_layers=3, capacity_factors=(0.0, 1.0, 2.0))


class Case(NamedTuple):
    """A step. plain: every operation in plain torch. stored: dtypes of weights and of the optimizer's averages."""

    shape: ModelShape = SHAPE
    images: int = 2
    grid: tuple[int, int] = (16, 16)
    text_tokens: int = 40
    bf16: bool = False
    plain: bool = False
    recompute: str = "none"
    accumulation: int = 1
    ep: int = 1
    replicate: int = 1
    reshard: bool = True
    chunks: int = 1
    stored: tuple[str, str] = ("fp32", "fp32")
    fp8: PrecisionConfig = PrecisionConfig()
    dispatcher: str = "alltoall"


class Measured(NamedTuple):
    """Peak bytes of tensors of one rank: in forward and backward, and in clipping and optimizer.

    kept_bytes: more at the end of the forward pass than before it.
    """

    forward_backward: int
    optimizer: int
    kept_bytes: int


def work_of(case: Case, world: int = 1) -> Work:
    """The step as the planner sees it."""
    choices = dict.fromkeys(FUSABLE, "torch" if case.plain else "auto")
    return Work(
        case.shape,
        make_layout(world, experts=case.shape.num_experts, ep=case.ep, replicate=case.replicate),
        MicroBatch(case.images, case.grid[0] * case.grid[1], case.text_tokens),
        case.accumulation,
        case.bf16,
        case.recompute,
        case.reshard,
        plain_operations(choices, "cpu", installed()),
        case.chunks,
        muon_bytes=4,
        device_type="cpu",
        exchange=case.dispatcher,
        fp8=case.fp8.fp8,
        fp8_layers=frozenset(case.fp8.fp8_layers),
        weight_bytes=STORED_BYTES[case.stored[0]],
        state_bytes=STORED_BYTES[case.stored[1]],
    )


def installed() -> frozenset[str]:
    """Backends of `auto` that this machine has."""
    try:
        import megatron_nucleus._C  # noqa: F401
    except ImportError:
        return frozenset({"torch"})
    return frozenset({"torch", "extension"})


def model_of(case: Case) -> NucleusTransformer:
    """On this rank, as a training run builds it."""
    names = dict.fromkeys(
        (f.name for f in dataclasses.fields(KernelConfig)), "torch" if case.plain else "auto"
    )
    config = ParallelConfig(
        expert_model_parallel_size=case.ep,
        data_parallel_replicate_size=case.replicate,
        recompute_granularity=case.recompute,
        reshard_after_forward=case.reshard,
        moe_overlap_chunks=case.chunks,
        moe_token_dispatcher_type=case.dispatcher,
    )
    parallel = join(config, case.shape)
    with torch.device("meta"):
        model = NucleusTransformer(case.shape, resolve_kernels(KernelConfig(**names)))
    apply_precision(model, case.fp8, device_type="cpu", bf16=case.bf16)
    model.to(STORED_DTYPES[case.stored[0]])
    parallelize(model, config, parallel, bf16=case.bf16)
    materialise(model, parallel.device, seed=0)
    return model


class Step:
    """One micro-batch after the other; `loss` and `backward` apart, so that the moment between them can be seen."""

    def __init__(self, case: Case, model: NucleusTransformer):
        self.case, self.model = case, model

    def inputs(self) -> list:
        """Latents, noise levels, text and target."""
        B, S = self.case.images, self.case.grid[0] * self.case.grid[1]
        latents = torch.randn(B, S, self.model.shape.patch_channels)
        text = TextFeatures(torch.randn(B, self.case.text_tokens, self.model.shape.text_dim))
        return [latents, torch.rand(B), text, torch.randn_like(latents)]

    def loss(self, latents, sigma, text, target) -> torch.Tensor:
        """As `training/step.py` forms it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.bf16):
            noisy = latents * 0.5
            velocity, routings = self.model(noisy, sigma, text, self.case.grid, return_routing=True)
        return flow_loss_per_image(velocity, target).mean() + 5e-7 * router_z_loss(routings)


def measure(case: Case) -> Measured:
    """The median of three steps behind a first one, which fills what stays for good.

    One step alone would not do: the profiler misses an event now and then, such as what a thread of gloo lets go of.
    """
    model = model_of(case)
    config = OptimizerConfig(master_weights=case.stored[0], state_dtype=case.stored[1])
    optimizer, step = build_optimizer(model, config), Step(case, model)
    group = dist.group.WORLD if dist.is_initialized() else None
    held = [*model.parameters(), *optimizer.tensors().values()]
    steady = _bytes(held)
    results = []
    for _ in range(4):
        gc.collect()
        with count_allocations() as backward:
            for number in range(case.accumulation):
                if group is not None:
                    model.set_requires_all_reduce(number == case.accumulation - 1)
                step.loss(*step.inputs()).backward()
        grads = _bytes([p.grad for p in optimizer.params.values()])
        with count_allocations() as update:
            clip_gradients(optimizer.params.values(), 1.0, group)
            optimizer.step(1e-6)
        optimizer.zero_grad()
        with count_allocations() as forward:
            loss = step.loss(*step.inputs())
        del loss
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        results.append(
            Measured(steady + backward.peak_bytes, steady + grads + update.peak_bytes, forward.kept_bytes)
        )
    return Measured(*map(statistics.median, zip(*results[1:], strict=True)))


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Of this rank's parts; FSDP makes the gradients of a group as parts of one storage."""
    storages = [local(t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
