"""Draw the embedded corpus: procedural scenes with three captions each, as WebDataset tars or a plain folder.

Scene i of a seed is always the same picture. Nothing that the benchmark holds out is ever drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_nucleus.data.scenes.export import FORMATS, export_scenes
from megatron_nucleus.data.scenes.world import SceneConfig
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser, add_arguments, load


@dataclasses.dataclass(frozen=True)
class MakeScenes:
    """Sections of the configuration."""

    scenes: SceneConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, draw, print."""
    parser = Parser(prog="tools/make_scenes.py", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which scenes [default 0]")
    parser.add_argument("--format", choices=FORMATS, default="webdataset", help="[default webdataset]")
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="scenes per tar [default 10000]"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with a section 'scenes'")
    add_json_flag(parser)
    add_arguments(parser, MakeScenes)
    args = parser.parse_args(argv)
    config = load(MakeScenes, args, args.config).scenes
    size = export_scenes(
        config,
        args.output,
        count=args.count,
        seed=args.seed,
        file_format=args.format,
        samples_per_shard=args.samples_per_shard,
        progress=True,
    )
    print(f"{args.output}: {args.count} scenes, {size / 2**20:.1f} MiB, seed {args.seed}")
    if args.json:
        print_json({"output": str(args.output), "count": args.count, "bytes": size, "seed": args.seed})


if __name__ == "__main__":
    run(main)
