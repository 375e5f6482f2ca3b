"""Images with captions -> checked, deduplicated, bucketed shards + Parquet index + report.html.

The input is a folder of images (searched recursively) with NAME.txt or NAME.json captions beside them, or of
WebDataset tars as img2dataset writes them, or both. Originals are only read. The same command goes on where a
stopped one left off.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from megatron_nucleus.data.curation.filters import CurationConfig
from megatron_nucleus.data.curation.pipeline import EngineConfig, curate
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, add_arguments, load


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sections of a curation config file."""

    curation: CurationConfig
    engine: EngineConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, curate, print."""
    parser = Parser(prog="curate.py", description=__doc__)
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of images or tars")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the data set, new or unfinished"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with sections curation and engine")
    add_arguments(parser, Settings)
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    settings = load(Settings, args, args.config)
    result = curate(args.input, args.output, settings.curation, settings.engine)
    _summary(result)
    if args.json:
        cli.print_json(result)


def _summary(result: dict) -> None:
    if result["already_complete"]:
        print(f"{result['output']} is already complete: same settings, same names and sizes of files")
    print(f"seen {result['seen']}, kept {result['kept']}")
    for verdict in ("rejected", "quarantined"):
        for reason, number in result[verdict].items():
            print(f"  {verdict} {number}: {reason}")
    for small, large in result["merged_buckets"].items():
        print(f"  bucket {small} is small; its images joined {large}")
    print(f"buckets: {', '.join(f'{b} {n}' for b, n in result['buckets'].items())}")
    if not result["already_complete"]:
        print(f"{result['images_per_s']:.0f} images/s, {result['wall_s']:.1f} s", file=sys.stderr)
    print(f"data set: {result['output']}\nreport: {result['report']}")


if __name__ == "__main__":
    cli.run(main, "the same command goes on from here")
