"""Average the weights of a window of checkpoints of a run (Warmup-Stable-Merge) into one native checkpoint.

The window: the N newest checkpoints, the N that end at a step (--last N --until STEP), or any steps by name. Folders
that keep their weights alone (--keep-last-weights of tools/train.py) serve as well as whole ones.

The weights, for the k-th newest of n checkpoints (k = 1 is the newest), always normalised to sum to 1:

  inverse_sqrt     1/sqrt(k)
  uniform          1
  ema              DECAY^(k-1)
  linear, cosine, one_minus_sqrt
                   those of a learning rate that decays so from 1 at the oldest checkpoint to 0 at the newest one
  custom           --weight-values, or the weights that --decay-multipliers stand for

Any such average imitates a decayed learning rate (arXiv 2507.17634): printed beside every weight is the multiplier
of the rate in the steps that lead to that checkpoint. Streams: memory stays near the largest tensor.

Nothing has to be planned: the rate of a run is constant, so the run itself goes on from its newest checkpoint with
the same tools/train.py command, before or after any merge. It goes on from an earlier step, with optimizer, samples,
curriculum and rate as they were there, after the same command was given once with --set-latest STEP.

A merged folder, like a step that keeps its weights alone, starts a new run: tools/train.py --init-from FOLDER
--run-dir NEW --seed OTHER. Its samples, curriculum and warm-up begin at 0; with the seed of the run that the weights
come from it would see the same images in the same order again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_nucleus.export.merge import merge
from megatron_nucleus.export.merge_weights import DEFAULT_EMA_DECAY, SCHEMES
from megatron_nucleus.export.safetensors_stream import parse_size
from megatron_nucleus.utils.cli import add_json_flag, print_json, progress_bar, run
from megatron_nucleus.utils.config import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, merge, print."""
    args = _parser().parse_args(argv)
    with progress_bar("merge") as progress:
        result = merge(
            args.checkpoints,
            args.output,
            args.weights,
            last=args.last,
            until=args.until,
            steps=args.steps,
            ema_decay=args.ema_decay,
            weight_values=args.weight_values,
            decay_multipliers=args.decay_multipliers,
            max_shard_bytes=parse_size(args.max_shard_size),
            checksums=not args.skip_checksums,
            progress=progress,
        )
    _print(result)
    if args.weight_values and not math.isclose(total := math.fsum(args.weight_values), 1.0):
        print(f"--weight-values sum to {total:g}; each was divided by it")
    if args.json:
        print_json(result)


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoints", required=True, metavar="DIR", help="run folder or its checkpoints folder"
    )
    window = parser.add_argument_group("window", "exactly one of --last and --steps")
    window.add_argument("--last", type=int, metavar="N", help="merge the N newest checkpoints")
    window.add_argument(
        "--until", type=int, metavar="STEP", help="with --last: the window ends at this step [default latest]"
    )
    window.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="merge exactly these steps")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--weights", default="inverse_sqrt", choices=SCHEMES, help="[default inverse_sqrt]")
    weights.add_argument(
        "--ema-decay",
        type=float,
        metavar="X",
        help=f"decay from one checkpoint to the next, with --weights ema [default {DEFAULT_EMA_DECAY}]",
    )
    weights.add_argument(
        "--weight-values",
        type=float,
        nargs="+",
        metavar="X",
        help="with --weights custom: one weight per checkpoint, oldest first; divided by their sum",
    )
    weights.add_argument(
        "--decay-multipliers",
        type=float,
        nargs="+",
        metavar="X",
        help="with --weights custom: multipliers of the learning rate, one per checkpoint, oldest first: 1 first, "
        "none above the one before it",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file [default 5GB]")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare SHA-256 (sizes always are)"
    )
    add_json_flag(parser)
    return parser


def _print(result: dict) -> None:
    print("weight    rate      checkpoint")
    for path, weight, rate in zip(
        result["inputs"], result["weights"], result["decay_multipliers"], strict=True
    ):
        print(f"{weight:.6f}  {rate:.6f}  {path}")
    print("rate: multiplier of the learning rate up to that checkpoint that this average imitates")
    print(
        f"{result['output']}: average of {len(result['inputs'])} checkpoints, {result['bytes'] / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    run(main)
