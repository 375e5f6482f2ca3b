"""Images with captions -> checked, deduplicated, scored, bucketed shards + Parquet index + report.html.

The input is a folder of images (searched recursively) with NAME.txt or NAME.json captions beside them, of tables
(CSV, JSONL, Parquet) that name image files, of WebDataset tars as img2dataset writes them, or of all of these.
Originals are only read. The same command goes on where a stopped one left off; with --update it refines a finished
data set. What runs, and in which order, is the recipe; a stage of your own is one line in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, add_arguments, load


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, curate, print."""
    parser = Parser(prog="curate.py", description=__doc__)
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of images, tables or tars")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the data set, new or unfinished; a finished one with --update or --retry-failed",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with a section per group of flags below")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="also in a finished output: try the items again that failed for a passing reason, those alone",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="also in a finished output: make again what other settings or another input change, keep the rest; the "
        "data set stays in use until its first shard is about to change",
    )
    add_arguments(parser, Settings)
    cli.add_json_flag(parser)
    args = parser.parse_args(argv)
    settings = load(Settings, args, args.config)
    result = curate(args.input, args.output, settings, retry_failed=args.retry_failed, update=args.update)
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
    if result["retryable"]:
        print(f"{result['retryable']} of them failed for a passing reason; --retry-failed tries them again")
    for small, large in result["merged_buckets"].items():
        print(f"  bucket {small} is small; its images joined {large}")
    print(f"buckets: {', '.join(f'{b} {n}' for b, n in result['buckets'].items())}")
    for stage in result["stages"]:
        if stage["wall_s"]:
            print(f"  {stage['stage']}: {stage['images_per_s']:.0f} images/s", file=sys.stderr)
    if not result["already_complete"]:
        print(f"{result['images_per_s']:.0f} images/s, {result['wall_s']:.1f} s", file=sys.stderr)
    print(f"data set: {result['output']}\nreport: {result['report']}")


if __name__ == "__main__":
    cli.run(main, "the same command goes on from here")
