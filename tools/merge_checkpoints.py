"""Average the weights of the last checkpoints of a run (Warmup-Stable-Merge) into one native checkpoint.

The k-th newest checkpoint (k = 1 is the newest) weighs 1/sqrt(k) (inverse_sqrt), the same (uniform), or
DECAY^(k-1) (ema), normalised to sum to 1. Streams: memory stays near the largest tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nucleus.export.merge import DEFAULT_EMA_DECAY, SCHEMES, merge
from megatron_nucleus.export.safetensors_stream import parse_size
from megatron_nucleus.utils.cli import add_json_flag, print_json, progress_bar, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, merge, print."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoints", required=True, metavar="DIR", help="run folder or its checkpoints folder"
    )
    parser.add_argument("--last", type=int, metavar="N", help="merge the N newest checkpoints")
    parser.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="merge exactly these steps")
    parser.add_argument("--weights", default="inverse_sqrt", choices=SCHEMES, help="[default inverse_sqrt]")
    parser.add_argument(
        "--ema-decay",
        type=float,
        metavar="X",
        help=f"decay from one checkpoint to the next, with --weights ema [default {DEFAULT_EMA_DECAY}]",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file [default 5GB]")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare SHA-256 (sizes always are)"
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    if args.ema_decay is not None and args.weights != "ema":
        raise ConfigError(f"--ema-decay {args.ema_decay}: only with --weights ema, not {args.weights}")
    with progress_bar("merge") as progress:
        result = merge(
            args.checkpoints,
            args.output,
            args.weights,
            last=args.last,
            steps=args.steps,
            ema_decay=DEFAULT_EMA_DECAY if args.ema_decay is None else args.ema_decay,
            max_shard_bytes=parse_size(args.max_shard_size),
            checksums=not args.skip_checksums,
            progress=progress,
        )
    for path, weight in zip(result["inputs"], result["weights"], strict=True):
        print(f"{weight:.6f}  {path}")
    print(
        f"{result['output']}: average of {len(result['inputs'])} checkpoints, {result['bytes'] / 1e9:.3f} GB"
    )
    if args.json:
        print_json(result)


if __name__ == "__main__":
    run(main)
