"""One plan: what a configuration takes on a number of GPUs, and what it might take otherwise."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape, resolve_shape
from megatron_nucleus.core.parallel_state import Layout, make_layout
from megatron_nucleus.core.precision.precision import check_settings
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training import flops
from megatron_nucleus.training.arguments import RunConfig, batch_split
from megatron_nucleus.training.planning import images, memory, step_time, traffic
from megatron_nucleus.training.planning.devices import (
    NETWORKS_GBITS,
    NO_GPU,
    Links,
    gpu_of,
    network_bytes_per_s,
)
from megatron_nucleus.training.planning.ledger import BF16_BYTES, FP32_BYTES, MicroBatch, plain_operations
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

DEFAULT_GPU = "h100"
QWEN3_VL_WIDTH = 4096  # of Qwen3-VL-8B, whose spec does not say it before its files are read
# A CUDA build of torch brings triton along; other optional libraries count only where they are named.
ON_A_GPU = frozenset({"torch", "triton"})
STORED_BYTES = {"fp32": FP32_BYTES, "bf16": BF16_BYTES}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The cluster that is planned for. --device names the GPU."""

    world_size: int = knob(help="ranks, one per GPU", unit="ranks")
    network: str = knob("ib400", f"between nodes: Gb/s per GPU, or one of {', '.join(NETWORKS_GBITS)}")
    gpus_per_node: int = knob(8, "GPUs joined by the fast links of a node", unit="GPUs")
    grid: tuple[int, ...] | None = knob(
        None, "image tokens, rows and columns; None = resolution_px through codec and patch", unit="tokens"
    )
    text_tokens: int = knob(128, "text tokens per image, padding included", unit="tokens")
    # One H200 reaches about 790 of 989 TFLOP/s in large bf16 products, 80 %; a step's products are smaller.
    matmul_efficiency: float = knob(0.7, "share of the matmul peak that products reach (own choice)")
    attention_efficiency: float = knob(0.5, "share of the matmul peak that attention reaches (own choice)")
    memory_efficiency: float = knob(0.8, "share of the memory bandwidth that other work reaches (own choice)")
    link_efficiency: float = knob(0.8, "share of link and network rates that exchanges reach (own choice)")
    memory_margin_frac: float = knob(
        0.1, "share of the GPU's memory left free: fragments, rounding (own choice)"
    )
    other_memory_gib: float = knob(
        3.0, "held beside the tensors of a step: CUDA, NCCL, encoders that run beside training", unit="GiB"
    )
    search: bool = knob(
        False, "choose expert parallelism, micro-batch and recomputation: the fastest forecast that fits"
    )

    def __post_init__(self) -> None:
        for name in ("world_size", "gpus_per_node", "text_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("matmul", "attention", "memory", "link"):
            if not 0.0 < getattr(self, f"{name}_efficiency") <= 1.0:
                value = getattr(self, f"{name}_efficiency")
                raise ConfigError(f"--{name}-efficiency {value}: must lie in (0, 1]")
        if not 0.0 <= self.memory_margin_frac < 1.0:
            raise ConfigError(f"--memory-margin-frac {self.memory_margin_frac}: must lie in [0, 1)")
        if not 0.0 <= self.other_memory_gib < float("inf"):
            raise ConfigError(f"--other-memory-gib {self.other_memory_gib}: must be a number >= 0")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ConfigError(
                f"--grid {' '.join(map(str, self.grid))}: expected two positive numbers of tokens"
            )
        network_bytes_per_s(self.network)


class Plan(NamedTuple):
    """One setting's figures.

    work: of the square images, whose time and traffic are forecast. largest: of the aspect bucket with most tokens,
    whose memory it is. usable_bytes: of a GPU, without margin and what else it holds.
    """

    work: memory.Work
    largest: memory.Work
    memory: memory.Memory
    time: step_time.StepTime
    usable_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the fullest moment stays within the usable memory."""
        return self.memory.total <= self.usable_bytes


def gpu_name(run: RunConfig) -> str:
    """The GPU that is planned for: ``training.device``, or the default where that names none."""
    return DEFAULT_GPU if run.training.device in NO_GPU else run.training.device


def shape_of(run: RunConfig) -> ModelShape:
    """The architecture, with the text width of the configured encoder where it is not given."""
    config = run.model
    if config.text_dim is None:
        width = run.encoders.text_spec().get("dim", QWEN3_VL_WIDTH)
        config = dataclasses.replace(config, text_dim=width)
    return resolve_shape(config)


def work_of(run: RunConfig, plan: PlanConfig) -> memory.Work:
    """One rank's step of a run, with square images or those of ``--grid``.

    Raises:
        ConfigError: as training would at its start: sizes that do not divide, backends that do not exist.
    """
    shape, p = shape_of(run), run.parallel
    layout = make_layout(
        plan.world_size,
        experts=shape.num_experts,
        ep=p.expert_model_parallel_size,
        replicate=p.data_parallel_replicate_size,
    )
    micro, accumulation = batch_split(run, plan.world_size)
    sizes = images.sizes_of(run, plan.grid, shape)
    images.check_tokens(run, shape, [sizes[images.SQUARE]])
    batch = MicroBatch(micro, sizes[images.SQUARE], plan.text_tokens)
    return work_with(run, shape, layout, batch, accumulation, "cuda", ON_A_GPU)


def work_with(
    run: RunConfig,
    shape: ModelShape,
    layout: Layout,
    batch: MicroBatch,
    accumulation: int,
    device_type: str,
    usable: frozenset[str],
) -> memory.Work:
    """One rank's step of a run on a given grid of ranks with a given micro-batch.

    Args:
        device_type: ``cuda`` or ``cpu``. usable: backends that are installed there.

    Raises:
        ConfigError: FP8 settings or backends that do not go together.
    """
    if run.precision.fp8 != "none" or run.precision.fp8_recipe is not None:
        check_precision(run, shape)
    p, o = run.parallel, run.optimizer
    choices = {
        f.name.removesuffix("_backend"): getattr(run.kernels, f.name) for f in dataclasses.fields(run.kernels)
    }
    narrow = {"auto": device_type == "cuda", "bf16": True, "fp32": False}[o.muon_dtype]
    return memory.Work(
        shape,
        layout,
        batch,
        accumulation,
        run.training.bf16,
        p.recompute_granularity,
        p.reshard_after_forward,
        plain_operations(choices, device_type, usable),
        p.moe_overlap_chunks,
        p.moe_shared_expert_overlap,
        o.optimizer,
        o.muon_num_ns_steps,
        BF16_BYTES if narrow else FP32_BYTES,
        device_type,
        p.moe_token_dispatcher_type if layout.ep > 1 else "alltoall",
        run.precision.fp8,
        frozenset(run.precision.fp8_layers),
        STORED_BYTES[o.master_weights],
        STORED_BYTES[o.state_dtype],
    )


def largest_of(run: RunConfig, plan: PlanConfig, work: memory.Work) -> memory.Work:
    """The same with images of the aspect bucket that has most tokens in a micro-batch."""
    sizes = images.sizes_of(run, plan.grid, work.shape)
    drawn = images.per_bucket(run, sizes, work.shape)
    pieces = plan.world_size * work.accumulation
    bucket = max(sizes, key=lambda b: sizes[b] * drawn[b])
    # A bucket with more images a step has as many micro-batches of more images.
    batch = work.batch._replace(images=-(-drawn[bucket] // pieces), tokens=sizes[bucket])
    return dataclasses.replace(work, batch=batch)


def check_precision(run: RunConfig, shape: ModelShape) -> None:
    """FP8 settings, as far as no library is needed to judge them.

    Raises:
        ConfigError: of `precision.check_settings`.
    """
    check_settings(
        _on_meta(shape),
        run.precision,
        bf16=run.training.bf16,
        recomputes=run.parallel.recompute_granularity != "none",
        compiles=run.parallel.compile_blocks,
    )


@functools.lru_cache(maxsize=1)
def _on_meta(shape: ModelShape) -> NucleusTransformer:
    with torch.device("meta"):
        return NucleusTransformer(shape)


def peak_flops(run: RunConfig) -> float:
    """Matmul peak of the planned GPU in the run's precision, FLOP/s."""
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    given = run.training.peak_tflops
    if given is not None and not 0 < given < float("inf"):
        raise ConfigError(f"--peak-tflops {given}: must be a number > 0")
    return given * 1e12 if given else gpu_of(gpu_name(run)).peak_flops(dtype)


def assess(run: RunConfig, plan: PlanConfig, work: memory.Work) -> Plan:
    """Memory and time of a step."""
    gpu = gpu_of(gpu_name(run))
    speed = step_time.rates(
        gpu, peak_flops(run), plan.matmul_efficiency, plan.attention_efficiency, plan.memory_efficiency,
        fp8=run.precision.fp8 != "none",
    )  # fmt: skip
    links = Links(
        gpu.link_bytes_per_s * plan.link_efficiency,
        network_bytes_per_s(plan.network) * plan.link_efficiency,
        plan.gpus_per_node,
    )
    usable = gpu.memory_bytes * (1 - plan.memory_margin_frac) - plan.other_memory_gib * 2**30
    largest = largest_of(run, plan, work)
    return Plan(work, largest, memory.peak(largest), step_time.forecast(work, speed, links), int(usable))


def figures(run: RunConfig, plan: PlanConfig, result: Plan) -> dict:
    """The JSON object of ``tools/plan.py``; the keys are those of the project's interface, and more."""
    work, time = result.work, result.time
    shape, batch = work.shape, work.batch
    per_image = flops.forward_flops_per_image(shape, batch.tokens, batch.text_tokens)
    step_images = work.layout.world * work.accumulation * batch.images
    step_flops = 3 * step_images * sum(per_image.values())
    fsdp = traffic.fsdp_bytes(work)
    phases = {name: m._asdict() | {"total": m.total} for name, m in memory.moments(result.largest).items()}
    return {
        "parameters": count_parameters(shape),
        "active_parameters": flops.active_parameter_count(shape),
        "forward_flops_per_image": sum(per_image.values()),
        "memory_bytes_per_rank": result.memory._asdict() | {"total": result.memory.total},
        "memory_bytes_per_rank_by_phase": phases,
        "usable_memory_bytes": result.usable_bytes,
        "fits": result.fits,
        "all_to_all_bytes_per_rank_per_step": traffic.all_to_all_bytes(work),
        "fsdp_bytes_per_rank_per_step": sum(fsdp.values()),
        "fsdp_bytes_by_kind": fsdp,
        "muon_bytes_per_rank_per_step": work.muon().sent_bytes,
        "step_s": time.step_s,
        "step_parts_s": dataclasses.asdict(time),
        "samples_per_s": step_images / time.step_s,
        "mfu": step_flops / (time.step_s * work.layout.world * peak_flops(run)),
        "model_flops_per_step": step_flops,
        "hardware_flops_per_step": work.layout.world * sum(flops.hardware_flops(work).values()),
        "peak_tflops": peak_flops(run) / 1e12,
        "device": gpu_name(run),
        "network": plan.network,
        "ranks": work.layout.world,
        "expert_model_parallel_size": work.layout.ep,
        "data_parallel_replicate_size": work.layout.replicate,
        "micro_batch_size": batch.images,
        "accumulation": work.accumulation,
        "recompute_granularity": work.recompute,
        "tokens": batch.tokens,
        "text_tokens": batch.text_tokens,
        "largest_bucket_tokens": result.largest.batch.tokens,
        "dtype": "bf16" if work.bf16 else "fp32",
        "fp8": work.fp8,
        "master_weights": run.optimizer.master_weights,
        "state_dtype": run.optimizer.state_dtype,
        "notes": notes(run, work),
    }


def notes(run: RunConfig, work: memory.Work) -> list[str]:
    """What of these settings the plan does not know."""
    out = []
    if work.exchange != "alltoall":
        buffers = "ElasticBuffer" if work.exchange == "deepep" else "HybridEPBuffer"
        out.append(
            f"{work.exchange}: memory by what our adapter allocates, without the library's own {buffers}; bytes and "
            "time as if no token shared its way with another expert's, so the most it can send"
        )
    if work.fp8 == "emulated":
        out.append(
            "emulated FP8: time is that of hardware products, which it has not; its copies are planned roughly"
        )
    elif work.fp8 != "none":
        out.append(
            f"FP8 of {work.fp8}: what it keeps is read from its sources, not measured; MFU is of the bf16 peak"
        )
    if work.bf16 and work.plain & {"modulated_layer_norm", "gated_residual_norm"}:
        out.append("plain LayerNorm: autocast gives fp32 on CUDA, which takes more memory than planned")
    return out
