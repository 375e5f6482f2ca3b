"""Look into a data set: counts, a contact sheet, samples by id or by the words of their captions.

Without an action it prints what the data set holds, and checks that every row of the index points at its sample. With
--verify it reads all shards and compares their checksums with the manifest. Works on curated images and on encoded
data; the latter holds no pictures.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_nucleus.data.shard_lookup import DataSet, extract, plain
from megatron_nucleus.inference.grid import CELL_PX, contact_sheet
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_atomic
from megatron_nucleus.utils.staging import check_writable, explain_writing

_MAX_SHEET = 400  # pictures on one sheet; own choice
_SHOWN = 8  # names of a table of counts; the rest is one line
_OF_SHEET = {"bucket": None, "tier": None, "episode": None, "count": 24, "seed": 0}


def build_parser() -> Parser:
    """Every flag of the program."""
    parser = Parser(prog="tools/inspect_shards.py", description=__doc__)
    parser.add_argument(
        "dataset", metavar="DATASET", help="folder that tools/curate.py or tools/encode.py made"
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--verify", action="store_true", help="read every shard and compare its checksum")
    actions.add_argument(
        "--sheet", metavar="FILE", help="PNG with pictures drawn by chance and their captions"
    )
    actions.add_argument(
        "--id",
        metavar="ID",
        help="samples whose id begins so, or whose path in the input ends so (whole names), kept or not",
    )
    actions.add_argument(
        "--text",
        metavar="WORDS",
        help='samples of which one caption has all these words; several words in quotes: "red house"',
    )
    sheet = parser.add_argument_group("of --sheet")
    sheet.add_argument("--bucket", metavar="WxH", help="this aspect bucket alone")
    sheet.add_argument("--tier", metavar="A1-A5", help="this tier alone")
    sheet.add_argument("--episode", metavar="B1-B8", help="this episode bucket alone")
    sheet.add_argument("--count", type=int, metavar="N", help="pictures [default 24]")
    sheet.add_argument("--seed", type=int, metavar="S", help="another seed draws others [default 0]")
    found = parser.add_argument_group("of --id and --text")
    found.add_argument(
        "--extract", metavar="DIR", help="write the original bytes and the JSON of the kept samples shown"
    )
    found.add_argument(
        "--limit", type=int, metavar="N", help="kept, and other, samples shown at most [default 10]"
    )
    cli.add_json_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, look, print."""
    args = build_parser().parse_args(argv)
    _check_flags(args)
    data = DataSet(args.dataset)
    if args.verify:
        result = _verify(data)
    elif args.sheet is not None:
        result = _sheet(data, args)
    elif _searching(args):
        result = _find(data, args)
    else:
        result = _summary(data)
    if args.json:
        cli.print_json({"dataset": str(Path(args.dataset).absolute()), **result})


def _searching(args: argparse.Namespace) -> bool:
    return args.id is not None or args.text is not None


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, and places that cannot be written; fill in defaults."""
    for name, default in _OF_SHEET.items():
        if getattr(args, name) is not None and args.sheet is None:
            raise ConfigError(f"--{name} belongs to --sheet FILE")
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    for name in ("extract", "limit"):
        if getattr(args, name) is not None and not _searching(args):
            raise ConfigError(f"--{name} belongs to --id and --text")
    if args.extract is not None:
        check_writable(args.extract, "--extract")
    if args.sheet is not None:
        _check_sheet(Path(args.sheet))
    args.limit = 10 if args.limit is None else args.limit
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: at least 1")
    if not 1 <= args.count <= _MAX_SHEET:
        raise ConfigError(f"--count {args.count}: 1 to {_MAX_SHEET}")


def _check_sheet(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--sheet {path}: give a name that ends in .png")
    if path.is_dir():
        raise ConfigError(f"--sheet {path}: is a folder; name a file")
    if not path.absolute().parent.exists():
        raise ConfigError(f"--sheet {path}: no such folder {path.parent}; create it first")
    check_writable(path.absolute().parent, "--sheet")


def _summary(data: DataSet) -> dict[str, Any]:
    shards = data.manifest["shards"]
    size = sum(shard["bytes"] for shard in shards)
    kind = "latents and text features" if data.encoded else "images"
    print(f"{data.manifest['samples']:,} samples ({kind}), {len(shards)} shards, {size:,} bytes")
    counts = data.counts()
    for title, name in (
        ("aspect buckets", "aspect_bucket"),
        ("tiers", "tier"),
        ("episode buckets", "episode_bucket"),
        ("licences", "licence"),
        ("collections", "source"),
        ("captions by length", "caption_lengths"),
        ("captions by source", "caption_sources"),
        ("scores", "scores"),
    ):
        print(f"{title}: {_listed(counts[name])}")
    print(f"captions: {counts['captions']:,}")
    print(f"duplicates: {counts['copies']:,} copies stand on {counts['clusters']:,} kept samples")
    for small, large in data.manifest.get("merged_buckets", {}).items():
        print(f"bucket {small} is small; its images joined {large}")
    with cli.progress_bar("checking the index", "sample") as progress:
        checked = data.check_members(progress)
    print(f"index: all {checked:,} rows point at their samples")
    seen = {name: value for name, value in data.manifest["counts"].items() if isinstance(value, int)}
    return {**counts, "shards": len(shards), "bytes": size, "encoded": data.encoded, "run": seen}


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{name} {number:,}" for name, number in list(counts.items())[:_SHOWN]]
    rest = sum(list(counts.values())[_SHOWN:])
    return ", ".join([*shown, *([f"others {rest:,}"] if rest else [])]) or "none"


def _verify(data: DataSet) -> dict[str, Any]:
    with cli.progress_bar("reading") as progress:
        size = data.verify(progress)
    with cli.progress_bar("checking the index", "sample") as progress:
        rows = data.check_members(progress)
    files = len(data.manifest["shards"]) + len(data.manifest["index"])
    print(f"{files} files, {size:,} bytes: all as the manifest says; {rows:,} rows point at their samples")
    return {"verified": True, "files": files, "bytes": size, "samples": rows}


def _sheet(data: DataSet, args: argparse.Namespace) -> dict[str, Any]:
    rows = data.draw(args.count, args.seed, args.bucket, args.tier, args.episode)
    pictures, captions = [], []
    for sample in data.samples(rows):
        picture = data.picture(sample, 2 * CELL_PX)
        picture.thumbnail((2 * CELL_PX, 2 * CELL_PX))  # not all pictures in full size in memory
        pictures.append(picture)
        captions.append(_words(sample.row))
    buffer = io.BytesIO()
    contact_sheet(pictures, captions).save(buffer, "PNG")
    with explain_writing(args.sheet, "nothing was written"):
        write_atomic(args.sheet, buffer.getvalue())
    print(f"{len(rows)} pictures: {args.sheet}")
    return {"sheet": str(Path(args.sheet).absolute()), "ids": [row["id"] for row in rows]}


def _words(row: dict[str, Any]) -> str:
    """What stands under a picture of the sheet."""
    place = " ".join(row[name] for name in ("tier", "episode_bucket") if row[name])
    caption = row["captions"][0]["text"] if row["captions"] else "(no caption)"
    return f"{row['id'][:10]} {place} {caption}"


def _find(data: DataSet, args: argparse.Namespace) -> dict[str, Any]:
    dropped, left_out = [], 0
    if args.id is not None:
        rows, number = data.by_id(args.id, args.limit)
        dropped, left_out = data.not_kept(args.id, args.limit)
        if not rows and not dropped:
            _complain(data, args.id)
    else:
        rows, number = data.by_text(args.text.split(), args.limit)
    for row in rows:
        _print_row(row)
    for row in dropped:
        _print_dropped(row)
    written = []
    if args.extract is not None:
        with explain_writing(args.extract, "what was written before is whole"):
            written = [
                str(path) for sample in data.samples(rows) for path in extract(sample, Path(args.extract))
            ]
        print(f"{len(written)} files in {args.extract}")
    print(
        _count(number, len(rows), "found")
        + (", " + _count(left_out, len(dropped), "not kept") if dropped else "")
    )
    not_kept = [{**row, "container": row["container"].decode("utf-8", "backslashreplace")} for row in dropped]
    return {
        "found": number,
        "rows": [plain(row) for row in rows],
        "found_not_kept": left_out,
        "not_kept": not_kept,
        "extracted": written,
    }


def _complain(data: DataSet, wanted: str) -> NoReturn:
    nearest = data.nearest_id(wanted)
    raise ConfigError(
        f"--id {wanted}: no image of {data.root}, kept or not, has an id that begins so or a path in the input that "
        f"ends so{f'; the nearest id is {nearest}' if nearest else ''}"
    )


def _count(number: int, shown: int, what: str) -> str:
    return f"{number:,} {what}" + (f", {shown} shown (--limit)" if number > shown else "")


def _print_dropped(row: dict[str, Any]) -> None:
    size = f", {row['width_px']} x {row['height_px']} px" if row["width_px"] else ""
    content = row["sha256"] or "content unknown"
    why = f"{row['verdict']} by {row['stage']}, {row['reason']} ({row['detail']})"
    print(f"not kept: {content} {row['item']}{size}: {why}")


def _print_row(row: dict[str, Any]) -> None:
    size = f"{row['width_px']} x {row['height_px']} px" if row["width_px"] else "size unknown"
    print(
        f"{row['id']}\n  {size}, bucket {row['aspect_bucket']}, tier {row['tier']}, episode {row['episode_bucket']}"
    )
    print(f"  in {row['tar']}, {row['length']:,} bytes from byte {row['offset']:,}")
    origin = [
        f"{name} {row[name]}" for name in ("source_id", "source", "source_url", "licence", "attribution")
    ]
    print(f"  {', '.join(text for text in origin if not text.endswith(' None'))}")
    for caption in row["captions"] or ():
        fit = "" if caption["alignment"] is None else f", alignment {caption['alignment']:.3g}"
        model = f", {caption['model']}" if caption["model"] else ""
        print(f"  caption ({caption['length_class']}, {caption['source']}{model}{fit}): {caption['text']}")
    for score in row["scores"] or ():
        print(f"  score {score['scorer']} {score['value']:.6g} ({score['revision']})")
    for copy in row["duplicates"] or ():
        distance = "" if copy["distance"] is None else f", distance {copy['distance']}"
        print(f"  copy {copy['id']} {copy['source_id']} ({copy['relation']}{distance})")
    versions = dict(row["stage_versions"] or [])
    if versions:
        print(f"  made by {', '.join(f'{name} {version}' for name, version in versions.items())}")


if __name__ == "__main__":
    cli.run(main)
