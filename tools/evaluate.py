"""Score pictures on a benchmark.

scenes: the embedded benchmark, six skills judged from the pixels; no download, no detector model.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nucleus.evaluation.scenes import SKILL_OF_TAG
from megatron_nucleus.evaluation.scenes_run import SceneEvaluation, evaluate_scenes
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser, add_arguments, load


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print."""
    parser = Parser(prog="tools/evaluate.py", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_scenes(benchmarks)
    args = parser.parse_args(argv)
    args.evaluate(args)


def _add_scenes(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "scenes",
        help="the embedded benchmark",
        description="Score the six skills of the embedded benchmark from one source of pictures.",
    )
    source = parser.add_argument_group("source", "exactly one of --images, --checkpoint and --truth")
    source.add_argument(
        "--images", metavar="DIR", help="<index>/metadata.jsonl and <index>/samples/0000.png ..."
    )
    source.add_argument("--checkpoint", metavar="PATH", help="generate with a native or diffusers checkpoint")
    source.add_argument("--truth", action="store_true", help="draw true scenes: the ceiling of the score")
    source.add_argument(
        "--untrained", action="store_true", help="with --checkpoint: same architecture, fresh weights"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="keep pictures and results here; the same command continues it"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with sections prompts, generation, truth")
    add_json_flag(parser)
    add_arguments(parser, SceneEvaluation)
    parser.set_defaults(evaluate=_scenes)


def _scenes(args) -> None:
    result = evaluate_scenes(
        load(SceneEvaluation, args, args.config),
        images=args.images,
        checkpoint=args.checkpoint,
        truth=args.truth,
        untrained=args.untrained,
        output=args.output,
    )
    for skill in ("mean", *SKILL_OF_TAG.values()):
        print(f"{skill:<18} {_percent(result[skill])}")
    for skill, value in result["held_out_pairs"].items():
        if skill != "samples":
            print(f"held-out pairs: {skill:<18} {_percent(value)}")
    print(f"samples            {result['samples']}")
    if args.json:
        print_json(result)


def _percent(value: float | None) -> str:
    return "no samples" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run(main, "the same command goes on if it has --output, else it starts again")
