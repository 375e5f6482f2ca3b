"""Train a sparse mixture-of-experts diffusion transformer; the same command again resumes.

Settings come from --config FILE (YAML, one section per group below) and from flags, which win. Several ranks:
torchrun --nproc-per-node N tools/train.py ..., or a script of examples/slurm.

A run goes on from its newest checkpoint. To let it go on from an earlier one, give the same command once with
--set-latest STEP, then again without, with other settings where you want them: what the run was after STEP is dropped
as it comes there again (copy the folder to keep it). --init-from starts a new run, at sample 0, from weights.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from megatron_nucleus.training.arguments import RunConfig, parse_run
from megatron_nucleus.training.initialize import end_rank
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="tools/train.py", description=__doc__)
    cli.add_json_flag(parser)
    parser.add_argument(
        "--explain-mesh", metavar="RANKS", type=int, nargs="?", const=0,
        help="print which ranks hold which experts and who talks to whom, then stop (default: this launch's ranks)",
    )  # fmt: skip
    parser.add_argument(
        "--set-latest", metavar="STEP", type=int,
        help="let the run go on from its checkpoint of this step when it is started the next time, then stop",
    )  # fmt: skip
    run, args = parse_run(argv, parser)
    if args.explain_mesh is not None:
        explain(run, args)
        return
    if args.set_latest is not None:
        set_latest(run, args)
        return
    rank = int(os.environ.get("RANK", "0"))
    console = logging.StreamHandler()
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)  # the run folder's log has it all
    logging.basicConfig(
        level=logging.INFO,
        handlers=[console],
        format="%(levelname)s %(message)s" if rank == 0 else f"%(levelname)s rank {rank}: %(message)s",
    )
    from megatron_nucleus.training.training import train

    with args.origins.named():
        result = train(run)
    if rank == 0:
        state = result.state
        print(f"{run.training.run_dir}: {state.step} steps, {state.samples_seen} samples, loss {result.loss}")
        if args.json:
            cli.print_json(
                {
                    "run_dir": str(run.training.run_dir),
                    "steps": state.step,
                    "samples_seen": state.samples_seen,
                    "loss": result.loss,
                    "skipped": state.skipped,
                }
            )


def set_latest(run: RunConfig, args: argparse.Namespace) -> None:
    """Choose the checkpoint that the next start resumes from; of several ranks the first does it."""
    from megatron_nucleus.training.checkpointing.step_folders import choose_latest

    if os.environ.get("RANK", "0") != "0":
        return
    step = choose_latest(run.training.run_dir, args.set_latest)
    print(f"{step}: the same command without --set-latest goes on from here")
    if args.json:
        cli.print_json({"latest": str(step)})


def explain(run: RunConfig, args: argparse.Namespace) -> None:
    """Print the grid of ranks; no process group is needed."""
    import dataclasses

    from megatron_nucleus.core.models.presets import resolve_shape
    from megatron_nucleus.core.parallel_state import explain_mesh, make_layout
    from megatron_nucleus.training.initialize import environment_number

    layout = make_layout(
        args.explain_mesh or environment_number("WORLD_SIZE", 1),
        experts=resolve_shape(run.model).num_experts,
        ep=run.parallel.expert_model_parallel_size,
        replicate=run.parallel.data_parallel_replicate_size,
    )
    print(explain_mesh(layout))
    if args.json:
        cli.print_json(dataclasses.asdict(layout))


if __name__ == "__main__":
    cli.run(main, "the same command goes on from the newest checkpoint")
    end_rank()
