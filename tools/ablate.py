"""Compare recipes at equal training FLOPs, over several seeds, on the embedded benchmark; a stopped bench goes on.

Suites of arms stand in a YAML file (its format: megatron_nucleus/training/ablation/plan.py). Every run, merge and score
is a program of tools/. Results: OUTPUT/rows.jsonl, a row per arm and seed; REPORT/README.md, results.json and figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_nucleus.training.ablation.bench import Bench
from megatron_nucleus.training.ablation.plan import check_seeds, read_suites
from megatron_nucleus.training.ablation.report import plan_table, write_report
from megatron_nucleus.training.ablation.suites import Suite
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError, StoppedError, nearest
from megatron_nucleus.utils.files import exclusive

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, plan, run, report."""
    args = _parse(argv)
    end = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    suites = choose(read_suites(args.config), args)
    print("\n\n".join(plan_table(suite) for suite in suites), flush=True)
    if args.plan_only:
        return
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with exclusive(output, "--output"):
        bench = Bench(output, ROOT)
        failed, stopped = {}, None
        if not args.report_only:
            try:
                failed = bench.run(suites, args.arms, args.jobs, end)
            except StoppedError as error:
                stopped = error
        report = Path(args.report).resolve() if args.report else output / "report"
        results = write_report(report, suites, bench.rows, _command(argv))
    finished = sum(len(suite["rows"]) for suite in results["suites"].values())
    print(f"{finished} rows in {output / 'rows.jsonl'}; report: {report / 'README.md'}")
    for error in failed.values():
        print(f"failed: {error}", file=sys.stderr)
    if failed:
        raise type(error)(f"{len(failed)} jobs failed, see above; the same command tries them again")
    if stopped is not None:
        raise stopped
    if args.json:
        cli.print_json({"output": str(output), "report": str(report), "rows": finished, "results": results})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tools/ablate.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with suites")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of runs and rows, new or to go on with"
    )
    parser.add_argument(
        "--report", metavar="DIR", help="folder of tables and figures [default OUTPUT/report]"
    )
    parser.add_argument("--suite", metavar="NAME", help="only this suite")
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="only these arms (and what they derive from)"
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="N", help="other seeds than the file's, min_seeds of them"
    )
    parser.add_argument("--jobs", default="1", metavar="N", help="programs side by side, one thread each [1]")
    parser.add_argument("--stop-after", metavar="MIN", help="stop after so many minutes (exit code 4)")
    parser.add_argument(
        "--plan-only", action="store_true", help="print what every arm would be given, then stop"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the report of the rows that there are"
    )
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    args.jobs = coerce(args.jobs, int, "--jobs")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    if args.stop_after is not None:
        args.stop_after = coerce(args.stop_after, float, "--stop-after")
        if not args.stop_after > 0:
            raise ConfigError(f"--stop-after {args.stop_after:g}: must be above 0 minutes")
    return args


def choose(suites: dict[str, Suite], args: argparse.Namespace) -> list[Suite]:
    """The suites that the flags ask for, with their seeds."""
    if args.suite is not None:
        if args.suite not in suites:
            raise ConfigError(
                f"--suite {args.suite}: unknown{nearest(args.suite, suites)}; one of: {', '.join(suites)}"
            )
        suites = {args.suite: suites[args.suite]}
    for name in args.arms or ():
        arms = {arm for suite in suites.values() for arm in suite.arms}
        if name not in arms:
            raise ConfigError(
                f"--arms {name}: unknown{nearest(name, arms)}; one of: {', '.join(sorted(arms))}"
            )
    chosen = list(suites.values())
    if args.seeds is not None:
        seeds = check_seeds(args.seeds, "--seeds", max(suite.min_seeds for suite in chosen))
        chosen = [dataclasses.replace(suite, seeds=seeds) for suite in chosen]
    return chosen


def _command(argv: Sequence[str] | None) -> str:
    return f"tools/ablate.py {shlex.join(sys.argv[1:] if argv is None else argv)}"


if __name__ == "__main__":
    cli.run(main, "the same command goes on where it was")
