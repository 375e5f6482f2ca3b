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

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from megatron_nucleus.core.kernels import KernelConfig
from megatron_nucleus.core.models.presets import ModelConfig
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.precision.precision import PrecisionConfig
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.training import arguments
from megatron_nucleus.training.benchmark.benchmark import BenchConfig, run_benchmark
from megatron_nucleus.training.benchmark.breakdown import OTHER
from megatron_nucleus.training.benchmark.record import check_record, provenance, record, where
from megatron_nucleus.training.benchmark.setup import (
    backends_of,
    dtype_of,
    hardware_flops_of,
    load_run,
    peak_of,
    prepare,
    reading_data,
)
from megatron_nucleus.training.initialize import end_rank, environment_number
from megatron_nucleus.training.profiling.regions import STEP_PARTS
from megatron_nucleus.utils import cli
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.devices import pick_device
from megatron_nucleus.utils.errors import ConfigError

TITLE = "Training steps"  # of the recorded table


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
    precision: PrecisionConfig


@dataclasses.dataclass(frozen=True)
class BenchOnly:
    """The one section that a training run does not have."""

    bench: BenchConfig


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = cfg.Parser(prog="tools/bench_train.py", description=__doc__)
    cli.add_json_flag(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of a training run; flags override it")
    parser.add_argument(
        "--record", metavar="FILE.md", help="keep the result in this table and in the JSON file beside it"
    )
    cfg.add_arguments(parser, Flags)
    args = parser.parse_args(words)
    target = check_record(args.record, TITLE) if args.record else None
    run, only = load_run(args, BenchOnly)
    result = time_run(run, only.bench)
    if environment_number("RANK", 0) != 0:
        return
    print(table(result))
    if target:
        entry = provenance([*_launcher(), "tools/bench_train.py", *words], pick_device(run.training.device))
        record(target, entry | {"result": result}, TITLE, markdown)
        print(f"recorded in {target} and {target.with_suffix('.json')}")
    if args.json:
        cli.print_json(result)


def _launcher() -> list[str]:
    """What started this rank, without what says where the ranks meet: other ranks are another measurement."""
    ranks = environment_number("WORLD_SIZE", 1)
    if ranks == 1:
        return []
    here = environment_number("LOCAL_WORLD_SIZE", ranks)
    nodes = ["--nnodes", str(ranks // here)] if here < ranks else []
    return ["torchrun", *nodes, "--nproc-per-node", str(here)]


def time_run(run: arguments.RunConfig, bench: BenchConfig) -> dict:
    """Build the model of ``run`` and time it; every rank calls this and gets the same figures."""
    ranks = environment_number("WORLD_SIZE", 1)
    if bench.compare and ranks > 1:
        raise ConfigError(
            f"--compare {bench.compare}: works in one process, not on {ranks} ranks; start it without torchrun"
        )
    model, work, parallel = prepare(run, bench)
    peak_flops, peak_source = peak_of(run, parallel)
    with reading_data(run, parallel) if bench.read_data else contextlib.nullcontext() as data:
        result = run_benchmark(
            model,
            bench,
            run.optimizer,
            work,
            peak_flops,
            parallel,
            data=data,
            compiled=run.parallel.compile_blocks,
        )
    return result | {
        "peak_source": peak_source,
        "hardware_flops_per_step": hardware_flops_of(run, bench, work, parallel),
        "dtype": dtype_of(run),
        "backends": backends_of(run, parallel),
    }


def table(result: dict) -> str:
    """The result for a person."""
    rows = [("part", "median ms", "25-75 %"), *(row for row in _rows(result))]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    mfu = (
        f", MFU {result['mfu']:.1%} of {result['peak_tflops']:g} TFLOP/s ({result['peak_source']})"
        if result["mfu"] is not None
        else ""
    )
    many = result["ranks"] > 1
    lines.append(
        f"step ({result['step']}): {result['step_s'] * 1e3:.1f} ms, {result['samples_per_s']:.1f} images/s, "
        f"{result['model_tflops']:.3f} model TFLOP/s{' per device' if many else ''}{mfu}; {result['dtype']}, "
        f"{result['device']}, {result['threads']} threads, {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if "breakdown" in result:
        lines += _breakdown(result["breakdown"])
    if many:
        lines += _communication(result)
    for part in ("forward", "forward_backward"):
        if part in result.get("compare", {}):
            other = result["compare"][part]
            lines.append(
                f"{part}: diffusers takes {other['ratio']:.2f} times as long ({other['expert_path']})"
            )
    if "compare" in result and not result["compare"]["settings"]["compiled_too"]:
        lines.append("diffusers' module was not compiled; --compare-compile times that, too")
    for variant, reason in result.get("compare", {}).get("refused", {}).items():
        lines.append(f"diffusers, {variant}: not timed, {reason}")
    return "\n".join(lines)


def _breakdown(times: dict[str, dict]) -> list[str]:
    """Where a step's time goes: its parts, then what is inside of them."""
    whole_s = times["step"]["median_s"]

    def shown(names: Sequence[str]) -> str:
        medians_s = {name: times[name]["median_s"] for name in names}
        return ", ".join(f"{name} {t * 1e3:.1f} ms ({t / whole_s:.0%})" for name, t in medians_s.items())

    parts = (*STEP_PARTS, OTHER)
    inside = [name for name in times if name not in ("step", *parts)]
    return [
        f"whole step with data {whole_s * 1e3:.1f} ms: {shown(parts)}",
        f"inside, forward and backward: {shown([n for n in inside if times[n]['median_s']])}",
    ]


def markdown(entries: list[dict]) -> str:
    """The recorded table: one row an entry, medians."""
    parts = ("data", "forward", "backward", "dispatch_combine", "optimizer")
    lines = [
        "Medians. Images/s, TFLOP/s and MFU are of the step, which has no data in it; the next five columns are of the "
        "whole step from within: dispatch/combine is part of forward and backward, as far as they wait for it. MFU: "
        "of model FLOPs, in parentheses the peak in TFLOP/s and whose it is. diffusers / ours: how many times as long "
        "diffusers' module takes, in parentheses the fastest of its ways; the others are in the JSON file.",
        "",
        "| # | step | images/s | model TFLOP/s | MFU | data | forward | backward | dispatch/combine | optimizer "
        "| spread (25-75 %) | diffusers / ours | dtype | threads | peak memory | hardware | torch | commit |",
        "|" + "---|" * 18,
    ]
    for number, entry in enumerate(entries, 1):
        r = entry["result"]
        main = r[r["step"].removesuffix("+optimizer")]
        inside = [f"{r['breakdown'][p]['median_s'] * 1e3:.2f} ms" if "breakdown" in r else "-" for p in parts]
        cells = [
            number,
            f"{r['step_s'] * 1e3:.2f} ms",
            f"{r['samples_per_s']:.1f}",
            f"{r['model_tflops']:.3f}",
            f"{r['mfu']:.1%} ({r['peak_tflops']:g}: {r['peak_source']})" if r["mfu"] is not None else "-",
            *inside,
            f"{(main['p75_s'] - main['p25_s']) / main['median_s']:.1%}",
            _ratio(r),
            r["dtype"],
            r["threads"],
            f"{r['peak_memory_bytes'] / 2**30:.2f} GiB",
            where(entry),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _ratio(result: dict) -> str:
    if "compare" not in result:
        return "-"
    part = result["compare"][result["step"]]
    return f"{part['ratio']:.2f} ({part['expert_path']})"


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
