"""Time the data path: images/s of every decoder and of the loader, and how long a training step waits for them.

The images are mosaics of photographs (scikit-image's by default) as JPEG, made on the spot in a few sizes. By decoder
that runs here: one process that only decodes; the loader with 0, 1, ... workers; a consumer that is busy elsewhere
for --step-s per micro-batch, as a training process is while its GPU computes; and real training steps of the demo
model on this machine. What a decoder changes of the pixels stands beside its speed. Example:

  tools/bench_data.py --record benchmarks/data_path.md
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_nucleus.data import decoders
from megatron_nucleus.data.bench_loading import (
    loaders,
    make_corpus,
    time_decoders,
    time_loader,
    time_waiting,
)
from megatron_nucleus.data.curation.bench_corpus import find_photographs
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.training.benchmark.record import check_record, provenance, record, where
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError, UserError

TITLE = "The data path"
ROOT = Path(__file__).resolve().parents[1]
TRAIN_LOG_STEPS = 5  # a figure of data_s each; the first, with the start of the workers in it, is left out


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    target = check_record(args.record, TITLE) if args.record else None
    entry = provenance(["tools/bench_data.py", *words], "cpu") | measure(args)
    print(markdown([entry]))
    if target is not None:
        record(target, entry, TITLE, markdown)
    if args.json:
        cli.print_json(entry)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Flags, numbers as such."""
    parser = Parser(prog="tools/bench_data.py", description=__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["512x512", "1024x1024", "2048x1536"], metavar="WxH",
        help="sizes of the JPEGs in px [512x512 1024x1024 2048x1536]")  # fmt: skip
    add("--resolutions-px", nargs="+", default=["256", "1024"], metavar="N",
        help="sides of the squares they are fitted into [256 1024]")  # fmt: skip
    add("--count", default="128", metavar="N", help="JPEGs of each size [128]")
    add("--batch", default="16", metavar="N", help="images of a micro-batch [16]")
    add("--batches", default="24", metavar="N", help="micro-batches that a loader is timed over [24]")
    add("--workers", nargs="+", default=["0", "1", "2"], metavar="N", help="loader processes [0 1 2]")
    add("--step-s", nargs="+", default=["0.1", "0.5"], metavar="S",
        help="seconds per micro-batch of the consumer that is busy elsewhere [0.1 0.5]")  # fmt: skip
    add("--train-steps", default="30", metavar="N", help="steps of the demo model by decoder; 0: none [30]")
    add("--photos", metavar="DIR", help="folder of photographs [scikit-image's]")
    add("--work", default="runs/bench_data", metavar="DIR", help="for images and runs [runs/bench_data]")
    add("--record", metavar="FILE.md", help="table to add this to; FILE.json beside it has all figures")
    cli.add_json_flag(parser)
    args = parser.parse_args(words)
    for name, least in (("count", 1), ("batch", 1), ("batches", 1), ("train_steps", 0)):
        setattr(args, name, _number(getattr(args, name), name, int, least))
    if 0 < args.train_steps < 2 * TRAIN_LOG_STEPS:
        raise ConfigError(f"--train-steps {args.train_steps}: 0, or {2 * TRAIN_LOG_STEPS} and more")
    for name, kind, least in (("resolutions_px", int, 16), ("workers", int, 0), ("step_s", float, 0)):
        setattr(args, name, [_number(word, name, kind, least) for word in getattr(args, name)])
    args.sizes = [_size(word) for word in args.sizes]
    return args


def _number(word: str, name: str, kind: type, least: float) -> float:
    flag = "--" + name.replace("_", "-")
    value = coerce(word, kind, flag)
    if not least <= value < float("inf"):
        raise ConfigError(f"{flag} {value}: {least} or more")
    return value


def _size(word: str) -> tuple[int, int]:
    width, _, height = word.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--sizes {word}: WIDTHxHEIGHT in px, such as 1024x1024")
    return int(width), int(height)


def measure(args: argparse.Namespace) -> dict:
    """All figures: ``not_run`` (decoder -> why) and the rows of ``decode``, ``loader``, ``wait``, ``train``."""
    reasons = {name: decoders.why_unavailable(name) for name in decoders.DECODERS}
    usable = [name for name, reason in reasons.items() if reason is None]
    photographs = find_photographs(Path(args.photos) if args.photos else _scikit_images())
    folder = Path(args.work)
    corpora = {s: make_corpus(folder / _named(s, args.count), photographs, s, args.count) for s in args.sizes}
    rows: dict[str, list[dict]] = {"decode": [], "loader": [], "wait": [], "train": []}
    for size, corpus in corpora.items():
        for side_px in args.resolutions_px:
            _say(f"decoding {_named(size)} px into {side_px} px")
            found = time_decoders(corpus, usable, side_px, args.batch)
            rows["decode"] += [{"image_px": _named(size), "resolution_px": side_px} | row for row in found]
    size = args.sizes[len(args.sizes) // 2]  # of loaders and training; one is enough to see what they add
    corpus = corpora[size]
    for side_px in args.resolutions_px:
        for config in loaders(corpus.root, usable, args.workers, side_px):
            _say(f"loading with {config.image_decoder} and {config.num_workers} workers into {side_px} px")
            setting = {"image_px": _named(size), "resolution_px": side_px}
            setting |= {"decoder": config.image_decoder, "workers": config.num_workers}
            rows["loader"].append(setting | time_loader(config, corpus, args.batch, args.batches))
            for step_s in args.step_s:
                found = time_waiting(config, corpus, args.batch, args.batches, step_s)
                rows["wait"].append(setting | found)
    if args.train_steps:
        runs = [(name, workers) for workers in args.workers for name in usable]
        runs = [(name, workers) for name, workers in runs if not (workers and name == decoders.DALI_MIXED)]
        rows["train"] = [train(corpus, name, workers, args.train_steps, folder) for name, workers in runs]
    not_run = {name: reason for name, reason in reasons.items() if reason is not None}
    return {"not_run": not_run, "count": args.count, "batch": args.batch, "batches": args.batches, **rows}


def train(corpus: Corpus, decoder: str, workers: int, steps: int, folder: Path) -> dict:
    """Steps of the demo model on the images: ``data_s`` and ``step_s`` (medians) and ``waiting_frac``, their ratio."""
    _say(f"training with {decoder} and {workers} workers")
    out = folder / f"train-{decoder}-{workers}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        str(ROOT / "tools" / "train.py"),
        "--config",
        str(ROOT / "examples/demo_cpu.yaml"),
    ]
    settings = {
        "--data-path": corpus.root, "--run-dir": out, "--image-decoder": decoder, "--num-workers": workers,
        "--train-steps": steps, "--global-batch-size": 32, "--log-interval": TRAIN_LOG_STEPS,
        "--save-interval": steps, "--sample-interval": 0,
    }  # fmt: skip
    command += [word for pair in settings.items() for word in map(str, pair)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} ended with code {done.returncode}: {done.stderr[-500:]}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    medians = {key: statistics.median(row[key] for row in metrics) for key in ("data_s", "step_s")}
    waiting = statistics.median(row["data_s"] / row["step_s"] for row in metrics)
    return {"decoder": decoder, "workers": workers, "steps": steps, **medians, "waiting_frac": waiting}


def _scikit_images() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ConfigError("--photos: scikit-image, whose photographs are the default, is not installed")
    return Path(spec.origin).parent / "data"


def _named(size: tuple[int, int], count: int | None = None) -> str:
    return f"{size[0]}x{size[1]}" + ("" if count is None else f"-{count}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown(entries: Sequence[dict]) -> str:
    """Tables of all entries, numbered as the commands below them."""
    parts = ["| # | measured on | torch | commit |\n|---:|---|---|---|"]
    parts += [f"| {number} | {where(entry)} |" for number, entry in enumerate(entries, 1)]
    blocks = ["\n".join(parts)]
    for number, entry in enumerate(entries, 1):
        blocks.append(f"## {number}. {entry['hardware']}")
        blocks += [f"{name} was not run: {reason}." for name, reason in entry["not_run"].items()]
        blocks += [_decode_table(entry), _loader_table(entry)]
        blocks += [_train_table(entry)] if entry["train"] else []
    return "\n\n".join(blocks)


def _decode_table(entry: dict) -> str:
    lines = [
        f"One process, {entry['count']} JPEGs of each size in memory, decoded and fitted into a square; median (lowest "
        f"- highest) of the turns. The last two columns compare pixels of {min(entry['batch'], entry['count'])} of "
        "them with Pillow's: mean difference in levels of 255, and values off by more than one level.",
        "",
        "| JPEG px | into px | decoder | images/s | by the library | mean difference | off by > 1 |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in entry["decode"]:
        rate = f"{row['images_per_s']:.0f} ({row['low']:.0f} - {row['high']:.0f})"
        lines.append(
            f"| {row['image_px']} | {row['resolution_px']} | {row['decoder']} | {rate} | {row['library_frac']:.0%} | "
            f"{row['mean_difference']:.2f} | {row['over_1_frac']:.2%} |"
        )
    return "\n".join(lines)


def _loader_table(entry: dict) -> str:
    steps = list(dict.fromkeys(row["step_s"] for row in entry["wait"]))
    key = ("image_px", "resolution_px", "decoder", "workers")
    waits = {(*(row[k] for k in key), row["step_s"]): row["waiting_frac"] for row in entry["wait"]}
    lines = [
        f"The loader, micro-batches of {entry['batch']}. Waiting: share of its time that a consumer waits which leaves "
        "the processor alone for so many seconds per micro-batch.",
        "",
        "| JPEG px | into px | decoder | workers | images/s | "
        + " | ".join(f"waiting, {s:g} s" for s in steps)
        + " |",
        "|---|---:|---|---:|---:|" + "---:|" * len(steps),
    ]
    for row in entry["loader"]:
        place = tuple(row[k] for k in key)
        lines.append(
            f"| {' | '.join(map(str, place))} | {row['images_per_s']:.0f} | "
            + " | ".join(f"{waits[*place, s]:.0%}" for s in steps)
            + " |"
        )
    return "\n".join(lines)


def _train_table(entry: dict) -> str:
    lines = [
        "Training steps of the demo model (32 images of 32 px) on the same processor, images as above; medians.",
        "",
        "| decoder | workers | step ms | of it waiting for data ms | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in entry["train"]:
        lines.append(
            f"| {row['decoder']} | {row['workers']} | {row['step_s'] * 1e3:.0f} | {row['data_s'] * 1e3:.1f} | "
            f"{row['waiting_frac']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, "finished images are kept")
