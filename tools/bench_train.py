"""Time a training step: forward, backward and optimizer, and diffusers' module with the same weights beside it.

The model and its batch are those of a training configuration (--config FILE, or flags). Images and text are random
numbers, so no data is needed. Over several ranks it is the distributed step: times are those of the slowest rank,
images/s those of all ranks together, TFLOP/s and MFU those of one device. Examples:

  tools/bench_train.py --config examples/demo_cpu.yaml --compare diffusers
  torchrun --nproc-per-node 4 tools/bench_train.py --config examples/demo_cpu.yaml --expert-model-parallel-size 2
  tools/bench_train.py --preset nucleus_image_17b --num-layers 1 --dense-moe-strategy all_moe --num-experts 8 \\
      --capacity-factors 2 --grid 16 16 --global-batch-size 1 --compare diffusers
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from megatron_nucleus.core.kernels import KernelConfig
from megatron_nucleus.core.models.presets import ModelConfig, ModelShape, resolve_shape
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.training import arguments, flops
from megatron_nucleus.training.benchmark.benchmark import BenchConfig, make_workload, run_benchmark
from megatron_nucleus.training.initialize import (
    Encoders,
    build_model,
    end_rank,
    environment_number,
    initialize,
)
from megatron_nucleus.utils import cli
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import Origins, read_yaml
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Sections whose flags this program takes; a configuration file may hold all sections of a training run."""

    bench: BenchConfig
    model: ModelConfig
    training: arguments.TrainingConfig
    data: DataConfig
    encoders: EncoderConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    kernels: KernelConfig


@dataclasses.dataclass(frozen=True)
class BenchOnly:
    """The one section that a training run does not have."""

    bench: BenchConfig


# Without a configuration file: the embedded task's size, which takes seconds on a CPU.
DEFAULTS = {"data": {"resolution_px": 32}}
VAE_STRIDE_PX = 8  # of the Qwen-Image VAE, whose spec does not say it


def main(argv: Sequence[str] | None = None) -> None:
    parser = cfg.Parser(prog="tools/bench_train.py", description=__doc__)
    cli.add_json_flag(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of a training run; flags override it")
    cfg.add_arguments(parser, Flags)
    args = parser.parse_args(argv)
    result = time_run(*load_run(args))
    if environment_number("RANK", 0) != 0:
        return
    print(table(result))
    if args.json:
        cli.print_json(result)


def load_run(args: argparse.Namespace) -> tuple[arguments.RunConfig, BenchConfig]:
    """Merge file and flags; ``data.data_path`` is not needed here."""
    values, origins = read_yaml(args.config) if args.config else (DEFAULTS, Origins())
    values = values | {"data": {"data_path": "none"} | values.get("data", {})}
    where = str(args.config or "defaults")
    only = {k: v for k, v in values.items() if k == "bench"}
    rest = {k: v for k, v in values.items() if k != "bench"}
    run = cfg.from_dict(arguments.RunConfig, rest, flags=vars(args), where=where, origins=origins)
    arguments.check(run)
    return run, cfg.from_dict(BenchOnly, only, flags=vars(args), where=where).bench


def time_run(run: arguments.RunConfig, bench: BenchConfig) -> dict:
    """Build the model of ``run`` and time it; every rank calls this and gets the same figures."""
    ranks = environment_number("WORLD_SIZE", 1)
    if bench.compare and ranks > 1:
        raise ConfigError(
            f"--compare {bench.compare}: works in one process, not on {ranks} ranks; start it without torchrun"
        )
    parallel = initialize(run)
    shape = resolve_shape(run.model)
    micro_batch_size, accumulation = arguments.batch_split(run, parallel.world)
    work = make_workload(
        shape,
        bench,
        grid_of(run, bench, shape),
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        bf16=run.training.bf16,
        device=parallel.device,
    )
    # Random inputs need no encoders, only the widths that encoders would give.
    encoders = Encoders(None, None, {}, {}, shape.latent_channels, shape.text_dim, None)
    model = build_model(run, parallel, encoders)
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    given = run.training.peak_tflops
    peak = given * 1e12 if given else flops.device_peak_flops(parallel.device, dtype)
    return run_benchmark(model, bench, run.optimizer, work, peak, parallel)


def grid_of(run: arguments.RunConfig, bench: BenchConfig, shape: ModelShape) -> tuple[int, int]:
    """Image tokens: ``--grid``, or the square of ``--resolution-px`` through codec and patch."""
    if bench.grid is not None:
        return (bench.grid[0], bench.grid[1])
    stride_px = run.encoders.codec_spec().get("stride_px", VAE_STRIDE_PX) * shape.patch_size
    if run.data.resolution_px % stride_px:
        raise ConfigError(
            f"--resolution-px {run.data.resolution_px}: must be a multiple of {stride_px} (codec stride x patch size)"
        )
    side = run.data.resolution_px // stride_px
    return (side, side)


def table(result: dict) -> str:
    """The result for a person."""
    rows = [("part", "median ms", "25-75 %"), *(row for row in _rows(result))]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    mfu = (
        f", MFU {result['mfu']:.1%} of {result['peak_tflops']:g} TFLOP/s" if result["mfu"] is not None else ""
    )
    many = result["ranks"] > 1
    lines.append(
        f"step ({result['step']}): {result['step_s'] * 1e3:.1f} ms, {result['samples_per_s']:.1f} images/s, "
        f"{result['model_tflops']:.3f} model TFLOP/s{' per device' if many else ''}{mfu}; {result['dtype']}, "
        f"{result['device']}, {result['threads']} threads, {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if many:
        lines += _communication(result)
    for part in ("forward", "forward_backward"):
        if part in result.get("compare", {}):
            other = result["compare"][part]
            lines.append(
                f"{part}: diffusers takes {other['ratio']:.2f} times as long ({other['expert_path']})"
            )
    return "\n".join(lines)


def _communication(result: dict) -> list[str]:
    """The grid of ranks and what one of them sends in a step."""
    dense, experts = (
        " x ".join(f"{axis} {size}" for axis, size in result[grid].items())
        for grid in ("dense_grid", "expert_grid")
    )
    sent, theory = result["all_to_all_bytes_per_rank_per_step"], result["all_to_all_bytes_theory"]
    line = f"a rank and step: {_mib(sent)} into all-to-alls, its own share included (theory {_mib(theory)})"
    stages = result["muon_bytes_per_rank_per_step"]
    if stages is not None:
        line += "; Muon " + ", ".join(f"{stage} {_mib(count)}" for stage, count in stages.items())
    return [f"{result['ranks']} ranks: dense {dense}; experts {experts}", line]


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _rows(result: dict) -> list[tuple[str, str, str]]:
    ours = ("forward", "accumulation", "forward_backward", "optimizer")
    parts = {name: result[name] for name in ours if name in result}
    for name in ("forward", "forward_backward"):
        if name in result.get("compare", {}):
            parts[f"diffusers {name}"] = result["compare"][name]
    return [
        (name, f"{t['median_s'] * 1e3:.2f}", f"{t['p25_s'] * 1e3:.2f} - {t['p75_s'] * 1e3:.2f}")
        for name, t in parts.items()
    ]


if __name__ == "__main__":
    cli.run(main)
    end_rank()
