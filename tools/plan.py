"""Forecast a training run on a cluster: memory, FLOPs, exchanges and time of a step, from this machine.

Nothing is run and no GPU is needed. The model and the batch are those of a training configuration; --device names the
GPU, --network what joins the nodes. Example:

  tools/plan.py --config examples/nucleus_image_17b/stage3_1024.yaml --world-size 64 --device h200 --search
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from megatron_nucleus.training import arguments
from megatron_nucleus.training.planning.plan import Plan, PlanConfig, assess, figures, work_of
from megatron_nucleus.training.planning.search import search
from megatron_nucleus.utils import cli
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import Origins, read_yaml

SHOWN = 12  # candidates of each kind


@dataclasses.dataclass(frozen=True)
class PlanOnly:
    """The one section that a training run does not have."""

    plan: PlanConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = cfg.Parser(prog="tools/plan.py", description=__doc__)
    cli.add_json_flag(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of a training run; flags override it")
    cfg.add_arguments(parser, PlanOnly)
    cfg.add_arguments(parser, arguments.RunConfig)
    args = parser.parse_args(argv)
    run, plan = load_run(args)
    plans = search(run, plan) if plan.search else []
    chosen = plans[0] if plans else assess(run, plan, work_of(run, plan))
    result = figures(run, plan, chosen)
    if plans:
        print(candidates(plans))
        result["candidates"] = [summary(p) for p in plans]
    print(table(result))
    if args.json:
        cli.print_json(result)


def load_run(args: argparse.Namespace) -> tuple[arguments.RunConfig, PlanConfig]:
    """Merge file and flags; ``data.data_path`` is not needed here."""
    values, origins = read_yaml(args.config) if args.config else ({}, Origins())
    values = values | {"data": {"data_path": "none"} | values.get("data", {})}
    where = str(args.config or "defaults")
    only = {k: v for k, v in values.items() if k == "plan"}
    rest = {k: v for k, v in values.items() if k != "plan"}
    plan = cfg.from_dict(PlanOnly, only, flags=vars(args), where=where, origins=origins).plan
    run = cfg.from_dict(arguments.RunConfig, rest, flags=vars(args), where=where, origins=origins)
    with origins.named():
        arguments.check(run)
    return run, plan


def summary(plan: Plan) -> dict:
    """One candidate."""
    work = plan.work
    return {
        "expert_model_parallel_size": work.layout.ep,
        "micro_batch_size": work.batch.images,
        "recompute_granularity": work.recompute,
        "step_s": plan.time.step_s,
        "memory_bytes": plan.memory.total,
        "fits": plan.fits,
    }


def candidates(plans: list[Plan]) -> str:
    """The settings that fit, fastest first, and why the next ones do not."""
    fit = [p for p in plans if p.fits]
    rest = [p for p in plans if not p.fits]
    lines = [f"{len(fit)} of {len(plans)} settings fit in {_gib(plans[0].usable_bytes)} of a rank"]
    lines.append("   EP  micro-batch  recompute   step s      GiB")
    lines += [_candidate(p) for p in fit[:SHOWN]]
    if rest:
        lines.append(f"too large, the least first{'' if fit else ': no setting fits'}")
        lines += [f"{_candidate(p)}   {_excess(p)}" for p in rest[:SHOWN]]
    return "\n".join([*lines, ""])


def _candidate(p: Plan) -> str:
    work = p.work
    return (
        f"{work.layout.ep:5d}  {work.batch.images:11d}  {work.recompute:9s}  {p.time.step_s:7.3f}  "
        f"{p.memory.total / 2**30:7.1f}"
    )


def _excess(p: Plan) -> str:
    """What is missing, and the term that takes most."""
    parts = p.memory._asdict()
    name = max(parts, key=parts.__getitem__)
    return f"{_gib(p.memory.total - p.usable_bytes)} too much; {name} {_gib(parts[name])}"


def table(result: dict) -> str:
    """The plan for a person."""
    r, memory, times = result, result["memory_bytes_per_rank"], result["step_parts_s"]
    nodes = f"{r['ranks']} x {r['device']} on {r['network']}"
    lines = [
        f"{nodes}: EP {r['expert_model_parallel_size']}, micro-batch {r['micro_batch_size']} x {r['accumulation']}, "
        f"recompute {r['recompute_granularity']}, {r['dtype']}, {r['tokens']} image + {r['text_tokens']} text tokens",
        f"parameters {r['parameters'] / 1e9:.2f} B, active {r['active_parameters'] / 1e9:.2f} B; forward "
        f"{r['forward_flops_per_image'] / 1e12:.2f} TFLOP per image; a step {r['model_flops_per_step'] / 1e15:.1f} "
        f"PFLOP of the model, {r['hardware_flops_per_step'] / 1e15:.1f} on the hardware",
        f"memory per rank at the fullest moment (images of {r['largest_bucket_tokens']} tokens): "
        + ", ".join(f"{name} {_gib(memory[name])}" for name in memory if name != "total")
        + f"; total {_gib(memory['total'])} of {_gib(r['usable_memory_bytes'])} usable: "
        + ("fits" if r["fits"] else "DOES NOT FIT (try --search)"),
        f"a rank and step: {_gib(r['all_to_all_bytes_per_rank_per_step'])} into all-to-alls (its own share included), "
        f"{_gib(r['fsdp_bytes_per_rank_per_step'])} sent by FSDP, "
        f"{_gib(sum(r['muon_bytes_per_rank_per_step'].values()))} by Muon",
    ]
    for phase, parts in r["memory_bytes_per_rank_by_phase"].items():
        lines.append(f"  {phase}: " + ", ".join(f"{name} {_gib(count)}" for name, count in parts.items()))
    lines.append(f"step {r['step_s']:.3f} s = " + " + ".join(_terms(times)))
    lines.append(
        f"{r['samples_per_s']:.1f} images/s, MFU {r['mfu']:.1%} of {r['peak_tflops']:g} TFLOP/s; a forecast, not a "
        "measurement: without data loading, launch times and waits for slower ranks"
    )
    lines += [f"note: {note}" for note in r["notes"]]
    return "\n".join(lines)


def _terms(times: dict) -> list[str]:
    """The parts that add up to the step."""
    names = {
        "forward_s": "forward", "backward_s": "backward", "recompute_s": "recompute", "muon_s": "Muon",
        "other_optimizer_s": "AdamW and clipping", "exposed_all_to_all_s": "exposed all-to-all",
        "exposed_fsdp_s": "exposed FSDP", "exposed_optimizer_s": "exposed optimizer exchange",
    }  # fmt: skip
    return [f"{text} {times[key]:.3f}" for key, text in names.items()]


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    cli.run(main)
