"""Score pictures on a benchmark.

scenes: the embedded benchmark, six skills judged from the pixels; no download, no detector model.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nucleus.evaluation.error_bars import shown
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
        description="Score the six skills of the embedded benchmark from one source of pictures.\n\n"
        "Every score comes with its standard error (±): it holds the noise of the pictures and the choice of prompts,\n"
        "not the difference between two trainings.",
    )
    source = parser.add_argument_group("source", "exactly one of --images, --checkpoint and --truth")
    source.add_argument(
        "--images",
        metavar="DIR",
        help="<index>/metadata.jsonl and <index>/samples/0000.png ..., or the --output of an earlier call",
    )
    source.add_argument("--checkpoint", metavar="PATH", help="generate with a native or diffusers checkpoint")
    source.add_argument("--truth", action="store_true", help="draw true scenes: the ceiling of the score")
    source.add_argument(
        "--untrained", action="store_true", help="with --checkpoint: same architecture, fresh weights"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="keep results and the pictures of each seed here; the same command, or one with more seeds, continues it",
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
    _print(result)
    if args.json:
        print_json(result)


def _print(result: dict) -> None:
    """Every score with its standard error and the number of pictures behind it."""
    skills, errors, counts = SKILL_OF_TAG.values(), result["standard_error"], result["samples_per_skill"]
    print(f"{'mean':<18} {shown(result['mean'], errors['mean'])} (n = {result['samples']})")
    for skill in skills:
        print(f"{skill:<18} {shown(result[skill], errors[skill])} (n = {counts[skill]})")
    held_out = result["held_out_pairs"]
    for skill in skills:
        if skill in held_out:
            print(f"held-out pairs: {skill:<18} {shown(held_out[skill], held_out['standard_error'][skill])}")
    print(f"samples            {result['samples']}")
    if result["std_over_seeds"] is not None:
        means = " ".join(f"{row['seed']}: {shown(row['mean'], None)}" for row in result["per_seed"])
        print(f"mean by seed       {means}; standard deviation {result['std_over_seeds']['mean']:.3f}")


if __name__ == "__main__":
    run(main, "the same command goes on if it has --output, else it starts again")
