"""Encode a data set once: latents of every image and features of every caption, for tools/train.py --data-path.

Reads a folder that tools/curate.py made; encoders, resolution and patch size come from the training run's
--config FILE and from flags, which win. Stopped, the same command goes on after the last finished shard.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from megatron_nucleus.core.models.presets import resolve_shape
from megatron_nucleus.data.encode import EncodeConfig, encode_corpus
from megatron_nucleus.data.encoders import EncoderConfig, build_codec, build_text_encoder
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils.cli import add_json_flag, print_json, progress_bar, run
from megatron_nucleus.utils.config import Parser, add_arguments, load
from megatron_nucleus.utils.devices import pick_device


@dataclasses.dataclass(frozen=True)
class Flags:
    """Sections with flags of their own; the other sections of --config FILE are read from there alone."""

    data: DataConfig
    encoders: EncoderConfig
    encode: EncodeConfig


@dataclasses.dataclass(frozen=True)
class EncodeRun:
    """What only this program has: flags, no section of the file."""

    encode: EncodeConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, encode, print."""
    parser = Parser(prog="tools/encode.py", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the encoded data set")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the training run")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda [default auto]")
    add_json_flag(parser)
    add_arguments(parser, Flags)
    args = parser.parse_args(argv)
    settings = load(RunConfig, args, args.config)
    encode = load(EncodeRun, args, None).encode
    device = pick_device(args.device)
    codec = build_codec(settings.encoders.codec_spec(), device)
    text_encoder = build_text_encoder(settings.encoders.text_spec(), device)
    start = time.perf_counter()
    with progress_bar("encode", unit=" images") as progress:
        result = encode_corpus(
            settings.data.data_path,
            args.output,
            codec,
            text_encoder,
            encode,
            resolution_px=settings.data.resolution_px,
            patch_size=resolve_shape(settings.model).patch_size,
            num_workers=settings.data.num_workers,
            progress=progress,
        )
    result = {"output": args.output, **result, "wall_s": time.perf_counter() - start}
    print(
        f"{args.output}: {result['kept']} of {result['seen']} images and {result['captions']} captions encoded "
        f"({result['captions_truncated']} captions cut), {result['bytes'] / 2**20:.1f} MiB in "
        f"{result['shards']} shards, {result['wall_s']:.1f} s"
    )
    for reason, count in result["quarantined"].items():
        print(f"left out: {count} x {reason} (see {args.output}/quarantine)")
    if args.json:
        print_json(result)


if __name__ == "__main__":
    run(main, "the same command goes on after the last finished shard")
