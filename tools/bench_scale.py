"""Time the training step at several expert-parallel sizes on one host, in turns, and write one JSON file.

Every size is a launch of torchrun with tools/bench_train.py. The launches take turns over several rounds, so that a
busy machine slows all sizes; a size's figure is the median over its rounds. What follows -- goes to
tools/bench_train.py as it is. Example:

  tools/bench_scale.py --ranks 4 --expert-model-parallel-sizes 1 2 4 --rounds 3 --output benchmarks/scale_cpu.json -- \\
      --config examples/demo_cpu.yaml --cpu-threads 1 --steps 5
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError, UserError
from megatron_nucleus.utils.files import write_json_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "tools/bench_train.py"
# What a user sees first of each size; the whole objects of tools/bench_train.py stand beside it.
FIGURES = ("step_s", "samples_per_s", "all_to_all_bytes_per_rank_per_step", "peak_memory_bytes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="tools/bench_scale.py", description=__doc__)
    parser.add_argument("--ranks", default="4", metavar="N", help="ranks of every launch [4]")
    parser.add_argument(
        "--expert-model-parallel-sizes", nargs="+", default=["1", "2", "4"], metavar="N",
        help="expert-parallel sizes to time, each a divisor of ranks and experts [1 2 4]",
    )  # fmt: skip
    parser.add_argument("--rounds", default="3", metavar="N", help="launches of each size [3]")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("bench", nargs="*", metavar="FLAG", help="after --: flags of tools/bench_train.py")
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    ranks, rounds = _positive(args.ranks, "--ranks"), _positive(args.rounds, "--rounds")
    sizes = [_positive(size, "--expert-model-parallel-sizes") for size in args.expert_model_parallel_sizes]
    output = Path(args.output)
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: no such folder {output.parent}; create it first")
    commands = {size: command(ranks, size, args.bench) for size in sizes}
    report = describe(commands, take_turns(commands, rounds, launch))
    write_json_atomic(output, report)
    print(f"{output}: {len(sizes)} sizes, {rounds} rounds")
    if args.json:
        cli.print_json(report)


def _positive(raw: str, flag: str) -> int:
    value = coerce(raw, int, flag)
    if value < 1:
        raise ConfigError(f"{flag} {value}: must be at least 1")
    return value


def command(ranks: int, size: int, flags: Sequence[str]) -> list[str]:
    """A launch, as its words: torchrun and everything behind it."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, PROGRAM, *flags, "--expert-model-parallel-size", str(size), "--json"]


def launch(words: list[str]) -> dict:
    """Run one launch; the ``--json`` object of its rank 0.

    Raises:
        UserError: it ended with an error, whose message is above.
    """
    paths = [str(ROOT / word) if word == PROGRAM else word for word in words[1:]]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *paths],
        stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # of the signals of a terminal it gets none: one of ours is enough
    )  # fmt: skip
    try:
        lines = process.communicate()[0].strip().splitlines()
    finally:
        process.terminate()  # ends its ranks, too; nothing where it has ended
        process.wait()
    if process.returncode:
        raise UserError(f"{shlex.join(words)} ended with code {process.returncode}; its message is above")
    return json.loads(lines[-1])


def take_turns(
    commands: dict[int, list[str]], rounds: int, run: Callable[[list[str]], dict]
) -> dict[int, list[dict]]:
    """Results of each size, round by round; every other round goes through the sizes backwards."""
    results: dict[int, list[dict]] = {size: [] for size in commands}
    for number in range(rounds):
        for size in list(commands) if number % 2 == 0 else reversed(list(commands)):
            result = run(commands[size])
            results[size].append(result)
            print(
                f"round {number + 1} of {rounds}, EP={size}: {result['step_s'] * 1e3:.0f} ms, "
                f"{result['samples_per_s']:.1f} images/s",
                flush=True,
            )
    return results


def describe(commands: dict[int, list[str]], results: dict[int, list[dict]]) -> dict:
    """The file: where it was measured, and per size the command, medians over the rounds, and all results."""
    return {
        "hardware": hardware(),
        "versions": {name: versions()[name] for name in ("megatron_nucleus", "torch", "python")},
        "commit": git_commit(),
        "runs": [
            {
                "command": shlex.join(commands[size]),
                "expert_model_parallel_size": size,
                "median": {key: statistics.median(r[key] for r in rounds) for key in FIGURES},
                "rounds": rounds,
            }
            for size, rounds in results.items()
        ],
    }


if __name__ == "__main__":
    cli.run(main)
