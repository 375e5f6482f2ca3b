"""Times a training step's parts over all ranks, and the same parts of diffusers' module beside those of one process.

The parts take turns (in a comparison ours, theirs, ours, ...), so that a busy or throttled machine slows all of
them. Inputs are random; time does not depend on their values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_nucleus.core.flow import velocity_target
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.optimizer import Optimizer, OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import DENSE_AXES, EXPERT_AXES, ParallelState
from megatron_nucleus.core.parallelize import expert_bytes_exchanged
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training import flops
from megatron_nucleus.training.benchmark.breakdown import Step, draw_noise, time_breakdown
from megatron_nucleus.training.benchmark.compare import compare, diffusers_parts, settings
from megatron_nucleus.training.benchmark.parts import Timed, Workload, call_ours, interleave, largest
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.traffic import all_to_all_bytes
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.memory import peak_memory_bytes
from megatron_nucleus.utils.tensors import local


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """The random inputs of a step."""

    grid: tuple[int, ...] | None = knob(
        None, "image tokens, rows and columns; None = resolution_px through codec and patch", unit="tokens"
    )
    text_tokens: int = knob(32, "text tokens per image, none of them padding", unit="tokens")

    def __post_init__(self) -> None:
        if self.text_tokens < 1:
            raise ConfigError(f"--text-tokens {self.text_tokens}: must be at least 1")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ConfigError(
                f"--grid {' '.join(map(str, self.grid))}: expected two positive numbers of tokens"
            )


@dataclasses.dataclass(frozen=True)
class BenchConfig(InputConfig):
    """What is timed."""

    steps: int = knob(10, "timed repetitions of every part", unit="steps")
    warmup: int = knob(2, "repetitions before the timed ones", unit="steps")
    forward_only: bool = knob(False, "time inference: the step is a forward pass without gradients")
    time_optimizer: bool | None = knob(
        None, "clipping and optimizer are part of the step; None = yes, but not with --compare"
    )
    compare: str | None = knob(None, "time another module with the same weights, too", choices=("diffusers",))
    compare_compile: bool = knob(False, "also time that module with its blocks compiled")
    compare_checkpointing: bool = knob(
        False, "that module with its gradient checkpointing, to stand beside --recompute-granularity full"
    )
    breakdown: bool | None = knob(
        None,
        "time what is inside of a step: data, attention, dispatch, experts, ...; None = where it has an optimizer",
    )
    read_data: bool = knob(
        False, "the breakdown's data are those of --data-path, through loader and encoders; else noise alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}"
                )
        for name in ("compare_compile", "compare_checkpointing"):
            if getattr(self, name) and not self.compare:
                raise ConfigError(f"--{name.replace('_', '-')}: needs --compare diffusers")
        if self.breakdown and self.forward_only:
            raise ConfigError("--breakdown does not go with --forward-only: its step has no parts")
        if self.read_data and not self.with_breakdown:
            raise ConfigError("--read-data: data are part of the breakdown alone; add --breakdown")
        if self.time_optimizer and (self.compare or self.forward_only):
            other = "--compare" if self.compare else "--forward-only"
            raise ConfigError(f"--time-optimizer does not go with {other}: its step has no optimizer")

    @property
    def with_optimizer(self) -> bool:
        """Whether the step includes clipping and the optimizer."""
        return not (self.compare or self.forward_only) and self.time_optimizer is not False

    @property
    def with_breakdown(self) -> bool:
        """Whether a step's parts are timed from within."""
        return self.with_optimizer if self.breakdown is None else self.breakdown

    @property
    def main_part(self) -> str:
        """What a step does with each of its micro-batches."""
        return "forward" if self.forward_only else "forward_backward"


def make_workload(
    shape: ModelShape,
    inputs: InputConfig,
    grid: tuple[int, int],
    *,
    micro_batch_size: int,
    accumulation: int,
    bf16: bool,
    device: torch.device,
) -> Workload:
    """Random inputs of one micro-batch of a rank, on ``device``: fp32, in a comparison the weights' dtype."""
    generator = torch.Generator().manual_seed(0)
    B, S = micro_batch_size, grid[0] * grid[1]
    compares = isinstance(inputs, BenchConfig) and inputs.compare is not None
    dtype = torch.bfloat16 if bf16 and compares else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    clean, noise = normal(B, S, shape.patch_channels), normal(B, S, shape.patch_channels)
    sigma = torch.rand(B, generator=generator).to(device, dtype)
    text = normal(B, inputs.text_tokens, shape.text_dim)
    return Workload(noise, sigma, text, velocity_target(clean, noise), grid, accumulation, bf16)


def run_benchmark(
    model: NucleusTransformer,
    bench: BenchConfig,
    optimizer_config: OptimizerConfig,
    work: Workload,
    peak_flops: float | None,
    parallel: ParallelState,
    *,
    data: Callable[[], object] | None = None,
    compiled: bool = False,
) -> dict:
    """Time ``model`` (and, on request, diffusers' module) and return the JSON object of ``tools/bench_train.py``.

    Every rank calls this and gets the same figures: seconds of the slowest rank in each repetition; samples and
    ``model_flops_per_step`` of all ranks together; ``mfu`` and ``model_tflops`` per device; memory and bytes of
    the rank that has the most. ``step_s`` adds up the medians of the step's parts, each timed by itself from an idle
    device to an idle device; ``breakdown`` is of whole steps, data included.

    Args:
        model: on its device, spread over the ranks of ``parallel``; its zero-initialised weights are randomised,
            and with bf16 and ``compare``, which is for one process, it is cast.
        work: of the same shape on every rank.
        peak_flops: of one device in FLOP/s, for MFU; None = unknown, then mfu is None.
        data: brings the breakdown's micro-batches; None = `draw_noise`. They are no part of ``step_s``.
        compiled: the model's blocks are compiled.

    Raises:
        ConfigError: diffusers is asked for and not installed.
        RuntimeError: diffusers' module computes something else with the same weights.
    """
    device = work.latents_BSP.device
    randomise_zeros(model)
    if work.bf16 and bench.compare:
        model.to(torch.bfloat16)
    optimizer = build_optimizer(model, optimizer_config) if bench.with_optimizer else None
    parts, counts = _parts_of_step(model, bench, optimizer, optimizer_config.clip_grad, work, parallel)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of a step, not of how the model was made
    sent: dict[str, int] = {}  # by each part's last run

    def note_bytes(part: str) -> None:
        sent[part] = expert_bytes_exchanged(model)

    measure = functools.partial(
        interleave, warmup=bench.warmup, device=device, control=parallel.control, after=note_bytes
    )
    theirs, refused = {}, {}
    if bench.compare:
        measure(parts, 1)
        memory = peak_memory_bytes(device)  # ours alone: theirs is not built yet
        ways = {"compiled": bench.compare_compile, "checkpointing": bench.compare_checkpointing}
        theirs, refused = diffusers_parts(model, work, bench.forward_only, **ways)
    times = measure(parts | theirs, bench.steps)
    memory = memory if bench.compare else peak_memory_bytes(device)
    step_s = sum(count * times[part].median_s for part, count in counts.items())
    step_bytes = sum(count * sent[part] for part, count in counts.items())
    result = _figures(model.shape, bench, work, step_s, peak_flops, parallel.world)
    result |= _communication(model.shape, bench, work, step_bytes, optimizer, parallel)
    result["peak_memory_bytes"] = int(largest([memory], parallel.control)[0])
    result |= {part: dataclasses.asdict(times[part]) for part in parts}
    if bench.with_breakdown:
        clip, group = optimizer_config.clip_grad, dist.group.WORLD if parallel.world > 1 else None
        timed = Timed(model, functools.partial(call_ours, model, work), work)
        step = Step(timed, optimizer, clip, data or draw_noise(work, model), group, compiled=compiled)
        inside = time_breakdown(step, bench.steps, bench.warmup, device, parallel.control)
        result["breakdown"] = {name: dataclasses.asdict(s) for name, s in inside.items()}
    if bench.compare:
        result["compare"] = compare(times, bench.main_part, work.accumulation)
        result["compare"] |= {"refused": refused, "settings": settings(work, **ways)}
    return result


def _parts_of_step(
    model: NucleusTransformer,
    bench: BenchConfig,
    optimizer: Optimizer | None,
    clip_grad: float,
    work: Workload,
    parallel: ParallelState,
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """(what to time, by name; how often one step does it).

    ``accumulation``: one of all micro-batches but one, whose gradients are added to those that are there, and after
    which copies of weights exchange nothing. A comparison is of fresh gradients alone, on both sides.
    """
    timed = Timed(model, functools.partial(call_ours, model, work), work)
    parts: dict[str, Callable[[], object]] = {"forward": timed.forward}
    counts = {bench.main_part: work.accumulation}
    if bench.forward_only:
        return parts, counts
    if work.accumulation > 1 and not bench.compare:
        parts["accumulation"] = functools.partial(timed.forward_backward, first=False, last=False)
        counts = {"accumulation": work.accumulation - 1, "forward_backward": 1}
    parts["forward_backward"] = timed.forward_backward
    if optimizer is not None:
        group = dist.group.WORLD if parallel.world > 1 else None
        parts["optimizer"] = functools.partial(_clip_and_step, optimizer, clip_grad, group)
        counts["optimizer"] = 1
    return parts, counts


def _clip_and_step(optimizer: Optimizer, clip_grad: float, group: dist.ProcessGroup | None) -> None:
    clip_gradients(optimizer.params.values(), clip_grad, group, optimizer.clip_ops)
    optimizer.step(1e-6)


def _figures(
    shape: ModelShape, bench: BenchConfig, work: Workload, step_s: float, peak_flops: float | None, ranks: int
) -> dict:
    """The step of all ranks, its rates, and what was timed."""
    device, tokens = work.latents_BSP.device, work.grid[0] * work.grid[1]
    forward_flops = sum(flops.forward_flops_per_image(shape, tokens, bench.text_tokens).values())
    samples = ranks * work.accumulation * work.latents_BSP.shape[0]
    step_flops = samples * forward_flops * (1 if bench.forward_only else 3)
    flops_per_s = step_flops / step_s / ranks
    return {
        "step_s": step_s,
        "samples_per_s": samples / step_s,
        "model_flops_per_step": step_flops,
        "mfu": flops_per_s / peak_flops if peak_flops else None,
        "step": bench.main_part + ("+optimizer" if bench.with_optimizer else ""),
        "samples_per_step": samples,
        "model_tflops": flops_per_s / 1e12,
        "peak_tflops": peak_flops / 1e12 if peak_flops else None,
        "tokens": tokens,
        "text_tokens": bench.text_tokens,
        "parameters": count_parameters(shape),
        "active_parameters": flops.active_parameter_count(shape),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "bf16" if work.bf16 else "fp32",
    }


def _communication(
    shape: ModelShape,
    bench: BenchConfig,
    work: Workload,
    step_bytes: int,
    optimizer: Optimizer | None,
    parallel: ParallelState,
) -> dict:
    """The grid of ranks and the bytes that a rank sends per step."""
    layout, control = parallel.layout, parallel.control
    muon_bytes = None
    if optimizer is not None:
        traffic = optimizer.muon.traffic()
        muon_bytes = dict(zip(traffic, map(int, largest(list(traffic.values()), control)), strict=True))
    batch = MicroBatch(work.latents_BSP.shape[0], work.grid[0] * work.grid[1], bench.text_tokens)
    planned = all_to_all_bytes(Work(shape, layout, batch, work.accumulation, work.bf16))
    return {
        "ranks": parallel.world,
        "expert_model_parallel_size": layout.ep,
        "data_parallel_replicate_size": layout.replicate,
        "dense_grid": {axis: getattr(layout, axis) for axis in DENSE_AXES},
        "expert_grid": {axis: getattr(layout, axis) for axis in EXPERT_AXES},
        "all_to_all_bytes_per_rank_per_step": int(largest([step_bytes], control)[0]),
        "all_to_all_bytes_theory": planned // (2 if bench.forward_only else 1),
        "muon_bytes_per_rank_per_step": muon_bytes,
    }


@torch.no_grad()
def randomise_zeros(model: nn.Module) -> None:
    """Give weights that start at zero small values: a model that is the identity would compare equal to anything.

    A weight's values depend on its name and shape alone, however it is spread over ranks.
    """
    for name, parameter in model.named_parameters():
        if local(parameter).any():
            continue
        values = torch.randn(parameter.shape, generator=rng.generator(1, 0, f"bench:{name}")) * 0.02
        if isinstance(parameter, DTensor):
            where = (parameter.device_mesh, parameter.placements)
            values = distribute_tensor(values, *where, src_data_rank=None)  # each rank drew the whole
        parameter.copy_(values)
