"""Train a sparse mixture-of-experts diffusion transformer; the same command again resumes.

Settings come from --config FILE (YAML, one section per group below) and from flags, which win.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="tools/train.py", description=__doc__)
    cli.add_json_flag(parser)
    run, args = parse_run(argv, parser)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from megatron_nucleus.training.training import train

    result = train(run)
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


if __name__ == "__main__":
    cli.run(main, "the same command goes on from the newest checkpoint")
