"""Convert between a native checkpoint and a diffusers folder, exactly, in both directions.

Streams: memory stays near the largest tensor whatever the size of the model. The output folder appears when it is
complete. Exported folders open in diffusers (NucleusMoEImageTransformer2DModel.from_pretrained) and here.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.safetensors_stream import parse_size
from megatron_nucleus.utils.cli import add_json_flag, print_json, progress_bar, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.devices import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, convert, print."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="run folder, one checkpoint, a merged folder, or a diffusers folder (also a pipeline with transformer/)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--to", required=True, choices=("hf", "native"), help="hf = diffusers folder; native = ours"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file [default 5GB]")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert values too [default: keep every bit]")
    parser.add_argument(
        "--skip-checksums",
        action="store_true",
        help="do not compare SHA-256 of native input (sizes always are)",
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    max_shard_bytes = parse_size(args.max_shard_size)
    with progress_bar("convert") as progress:
        result = convert(
            args.input,
            args.output,
            args.to,
            max_shard_bytes=max_shard_bytes,
            dtype=args.dtype,
            checksums=not args.skip_checksums,
            progress=progress,
        )
    print(
        f"{result['output']}: {result['tensors']} tensors, {result['parameters']:,} parameters, "
        f"{result['bytes'] / 1e9:.3f} GB in {result['wall_s']:.1f} s"
    )
    if args.json:
        print_json(result)


if __name__ == "__main__":
    run(main)
