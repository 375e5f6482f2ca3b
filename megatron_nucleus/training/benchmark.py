"""Times a training step's parts, and the same parts of diffusers' module with the same weights beside them.

Both modules run in one process and take turns (ours, theirs, ours, ...), so that a busy or throttled machine slows
both. Inputs are random; time does not depend on their values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_nucleus.core.flow import velocity_target
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.export.hf_keys import count_parameters, to_diffusers_config, to_diffusers_state
from megatron_nucleus.training import flops
from megatron_nucleus.training.losses import flow_loss
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.memory import peak_memory_bytes

# Largest difference of the two modules' fp32 outputs, relative to their RMS, that counts as the same function.
SAME_OUTPUT = 1e-3


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is timed."""

    grid: tuple[int, ...] | None = knob(
        None, "image tokens, rows and columns; None = resolution_px through codec and patch", unit="tokens"
    )
    text_tokens: int = knob(32, "text tokens per image, none of them padding", unit="tokens")
    steps: int = knob(10, "timed repetitions of every part", unit="steps")
    warmup: int = knob(2, "repetitions before the timed ones", unit="steps")
    forward_only: bool = knob(False, "time inference: the step is a forward pass without gradients")
    time_optimizer: bool | None = knob(
        None, "clipping and optimizer are part of the step; None = yes, but not with --compare"
    )
    compare: str | None = knob(None, "time another module with the same weights, too", choices=("diffusers",))

    def __post_init__(self) -> None:
        for name, least in (("text_tokens", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}"
                )
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ConfigError(
                f"--grid {' '.join(map(str, self.grid))}: expected two positive numbers of tokens"
            )
        if self.time_optimizer and (self.compare or self.forward_only):
            other = "--compare" if self.compare else "--forward-only"
            raise ConfigError(f"--time-optimizer does not go with {other}: its step has no optimizer")

    @property
    def with_optimizer(self) -> bool:
        """Whether the step includes clipping and the optimizer."""
        return not (self.compare or self.forward_only) and self.time_optimizer is not False


@dataclasses.dataclass(frozen=True)
class Workload:
    """One micro-batch and how it is computed.

    accumulation: micro-batches per step. bf16: autocast as in training, or bf16 weights where two modules are
    compared (diffusers' module does not run under autocast).
    """

    latents_BSP: Tensor
    sigma_B: Tensor
    text_BLU: Tensor
    target_BSP: Tensor
    grid: tuple[int, int]
    accumulation: int
    bf16: bool


def make_workload(
    shape: ModelShape,
    bench: BenchConfig,
    grid: tuple[int, int],
    *,
    micro_batch_size: int,
    accumulation: int,
    bf16: bool,
    device: torch.device,
) -> Workload:
    """Random inputs of one micro-batch on ``device``."""
    generator = torch.Generator().manual_seed(0)
    B, S = micro_batch_size, grid[0] * grid[1]
    dtype = torch.bfloat16 if bf16 and bench.compare else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    clean, noise = normal(B, S, shape.patch_channels), normal(B, S, shape.patch_channels)
    sigma = torch.rand(B, generator=generator).to(device, dtype)
    text = normal(B, bench.text_tokens, shape.text_dim)
    return Workload(noise, sigma, text, velocity_target(clean, noise), grid, accumulation, bf16)


def run_benchmark(
    model: NucleusTransformer,
    bench: BenchConfig,
    optimizer_config: OptimizerConfig,
    work: Workload,
    peak_flops: float | None,
) -> dict:
    """Time ``model`` (and, on request, diffusers' module) and return the JSON object of ``tools/bench_train.py``.

    Args:
        model: on its device; its zero-initialised weights are randomised, and with bf16 and ``compare`` it is cast.
        peak_flops: device peak in FLOP/s for MFU; None = unknown, then mfu is None.

    Raises:
        ConfigError: diffusers is asked for and not installed.
        RuntimeError: diffusers' module computes something else with the same weights.
    """
    shape, device = model.shape, work.latents_BSP.device
    _randomise_zeros(model)
    if work.bf16 and bench.compare:
        model.to(torch.bfloat16)
    ours = Timed(model, functools.partial(_call_ours, model, work), work)
    parts = {"forward": ours.forward}
    if not bench.forward_only:
        parts["forward_backward"] = ours.forward_backward
    if bench.with_optimizer:
        parts["optimizer"] = _optimizer_part(model, optimizer_config)
    if not bench.compare:
        times = interleave(parts, bench.steps, bench.warmup, device)
        memory = peak_memory_bytes(device)
    else:
        interleave(parts, 1, bench.warmup, device)
        memory = peak_memory_bytes(device)  # ours alone: theirs is not built yet
        others = diffusers_parts(model, work, bench.forward_only)
        times = interleave(parts | others, bench.steps, bench.warmup, device)
    main = "forward" if bench.forward_only else "forward_backward"
    step_s = work.accumulation * times[main].median_s + (
        times["optimizer"].median_s if bench.with_optimizer else 0.0
    )
    tokens = work.grid[0] * work.grid[1]
    forward_flops = sum(flops.forward_flops_per_image(shape, tokens, bench.text_tokens).values())
    samples = work.accumulation * work.latents_BSP.shape[0]
    step_flops = samples * forward_flops * (1 if bench.forward_only else 3)
    result = {
        "step_s": step_s,
        "samples_per_s": samples / step_s,
        "model_flops_per_step": step_flops,
        "mfu": step_flops / step_s / peak_flops if peak_flops else None,
        "peak_memory_bytes": memory,
        "step": main + ("+optimizer" if bench.with_optimizer else ""),
        "samples_per_step": samples,
        "model_tflops": step_flops / step_s / 1e12,
        "peak_tflops": peak_flops / 1e12 if peak_flops else None,
        "tokens": tokens,
        "text_tokens": bench.text_tokens,
        "parameters": count_parameters(shape),
        "active_parameters": flops.active_parameter_count(shape),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "bf16" if work.bf16 else "fp32",
    } | {name: dataclasses.asdict(times[name]) for name in parts}
    if bench.compare:
        result["compare"] = _compare(times, main, work.accumulation)
    return result


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of one part: median, quartiles and least of ``repeats`` runs."""

    median_s: float
    p25_s: float
    p75_s: float
    min_s: float
    repeats: int


def spread(seconds: list[float]) -> Spread:
    """Summary of one part's times."""
    ordered = sorted(seconds)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(statistics.median(ordered), quartiles[0], quartiles[2], ordered[0], len(ordered))


def interleave(
    parts: dict[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, Spread]:
    """Run all parts in turn, ``warmup`` rounds untimed and ``repeats`` rounds timed; every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_number in range(warmup + repeats):
        for name in list(parts) if round_number % 2 == 0 else reversed(list(parts)):
            _wait(device)
            start = time.perf_counter()
            parts[name]()
            _wait(device)
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: spread(values) for name, values in seconds.items()}


class Timed:
    """A module and its call as two parts, forward (no gradients) and forward + backward, with one loss for all."""

    def __init__(self, module: nn.Module, call: Callable[[], Tensor], work: Workload):
        self.module, self.call, self.work = module, call, work
        self.autocast = work.bf16 and work.latents_BSP.dtype == torch.float32

    def forward(self) -> Tensor:
        """Velocity without gradients."""
        with torch.no_grad(), self._precision():
            return self.call()

    def forward_backward(self) -> None:
        """Fresh gradients of the velocity MSE in ``module``."""
        for p in self.module.parameters():
            p.grad = None
        with self._precision():
            velocity = self.call()
        flow_loss(velocity, self.work.target_BSP).backward()

    def _precision(self) -> contextlib.AbstractContextManager:
        device_type = self.work.latents_BSP.device.type
        return torch.autocast(device_type, torch.bfloat16) if self.autocast else contextlib.nullcontext()


def diffusers_parts(model: NucleusTransformer, work: Workload, forward_only: bool) -> dict[str, Callable]:
    """diffusers' module with ``model``'s weights as parts ``theirs/<expert path>/<forward | forward_backward>``.

    Both of its expert paths are timed, the loop and grouped_mm, where the latter takes the widths.

    Raises:
        ConfigError: diffusers is not installed.
        RuntimeError: its output is not ours.
    """
    try:
        from diffusers import NucleusMoEImageTransformer2DModel
    except ImportError as error:
        raise ConfigError("--compare diffusers: needs diffusers >= 0.38, not installed here") from error
    config = {k: v for k, v in to_diffusers_config(model.shape).items() if not k.startswith("_")}
    paths = ("loop", "grouped_mm") if config.pop("use_grouped_mm") else ("loop",)
    other = NucleusMoEImageTransformer2DModel(**config).to(work.latents_BSP.device)
    # assign: both modules share the storage of every tensor whose layout is the same.
    state = to_diffusers_state({k: v.detach() for k, v in model.state_dict().items()}, model.shape)
    other.load_state_dict(state, assign=True)
    _check_same(model, other, work, paths)
    for p in other.parameters():
        p.requires_grad_(True)
    parts: dict[str, Callable] = {}
    for path in paths:
        timed = Timed(other, functools.partial(_call_theirs, other, work, path), work)
        parts[f"theirs/{path}/forward"] = timed.forward
        if not forward_only:
            parts[f"theirs/{path}/forward_backward"] = timed.forward_backward
    return parts


def _call_ours(model: NucleusTransformer, work: Workload) -> Tensor:
    return model(work.latents_BSP, work.sigma_B, TextFeatures(work.text_BLU), work.grid)


def _call_theirs(other: nn.Module, work: Workload, path: str) -> Tensor:
    for block in other.transformer_blocks:
        if block.moe_enabled:
            block.img_mlp.experts.use_grouped_mm = path == "grouped_mm"
    image = (1, *work.grid)
    return other(work.latents_BSP, image, work.text_BLU, timestep=work.sigma_B, return_dict=False)[0]


@torch.no_grad()
def _check_same(model: NucleusTransformer, other: nn.Module, work: Workload, paths: tuple[str, ...]) -> None:
    """Both modules in fp32 (where no rounding turns a routing decision) must give one output."""
    dtype = work.latents_BSP.dtype
    wide = dataclasses.replace(
        work,
        latents_BSP=work.latents_BSP.float(),
        sigma_B=work.sigma_B.float(),
        text_BLU=work.text_BLU.float(),
    )
    modules = [] if dtype == torch.float32 else [model, other]
    for module in modules:
        module.float()
    ours_BSP = _call_ours(model, wide)
    for path in paths:
        difference = (
            _call_theirs(other, wide, path) - ours_BSP
        ).abs().max() / ours_BSP.square().mean().sqrt()
        if not float(difference) <= SAME_OUTPUT:
            raise RuntimeError(
                f"diffusers ({path}) computes something else with the same weights: largest difference "
                f"{float(difference):.2g} of the output's RMS, allowed {SAME_OUTPUT}"
            )
    for module in modules:
        module.to(dtype)


def _compare(times: dict[str, Spread], main: str, accumulation: int) -> dict:
    """Ours against the faster of their expert paths, chosen for each part by itself."""
    out: dict = {"name": "diffusers"}
    for part in ("forward", "forward_backward"):
        candidates = {
            n.split("/")[1]: t for n, t in times.items() if n.startswith("theirs/") and n.endswith(f"/{part}")
        }
        if not candidates:
            continue
        path = min(candidates, key=lambda name: candidates[name].median_s)
        ratio = candidates[path].median_s / times[part].median_s
        if part == main:
            out |= {"step_s": accumulation * candidates[path].median_s, "ratio": ratio}
        out[part] = {"expert_path": path, "ratio": ratio} | dataclasses.asdict(candidates[path])
        out[part]["all_paths_s"] = {name: t.median_s for name, t in candidates.items()}
    return out


def _optimizer_part(model: NucleusTransformer, config: OptimizerConfig) -> Callable[[], None]:
    optimizer = build_optimizer(model, config)

    def part() -> None:
        clip_gradients(optimizer.params.values(), config.clip_grad)
        optimizer.step(1e-6)

    return part


@torch.no_grad()
def _randomise_zeros(model: nn.Module) -> None:
    """Give weights that start at zero small values: a model that is the identity would compare equal to anything."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
