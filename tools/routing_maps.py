"""Show which experts work where while a model draws a prompt.

Writes into DIR: allocation.png (how many experts took each token, by layer and denoising step), experts.png (which
tokens each expert took), routing.html (one page with sliders for layer and step; open it in a browser) and routing.json
(every figure). Settings that are not given are those stored in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nucleus.evaluation.allocation import draw_with_routing, moe_layers
from megatron_nucleus.evaluation.routing_maps import check_folder, check_layers, write_routing_maps
from megatron_nucleus.export.load import read_description
from megatron_nucleus.inference.flags import (
    add_machine_flags,
    add_sampling_flags,
    pipeline_of,
    sampling_of,
)
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError


def build_parser() -> Parser:
    """Every flag of the program."""
    parser = Parser(prog="tools/routing_maps.py", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="run, step, merged, diffusers or pipeline folder"
    )
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help='what to draw; "" is the empty prompt'
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the maps")
    parser.add_argument("--overwrite", action="store_true", help="replace the maps of an earlier job in DIR")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N",
        help="layers of experts.png [default: the first, middle and last MoE layer]",
    )  # fmt: skip
    add_sampling_flags(parser)
    add_machine_flags(parser)
    add_json_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, draw, write, print."""
    args = build_parser().parse_args(argv)
    check_folder(args.output, args.overwrite)  # before a model is loaded
    layers = moe_layers(read_description(args.checkpoint).shape)
    if not layers:
        raise ConfigError(
            f"--checkpoint {args.checkpoint}: the model has no MoE layers, so nothing is routed; name one with experts"
        )
    check_layers(args.layers, layers)
    pipeline = pipeline_of(args)
    config = sampling_of(args, pipeline)
    drawing = draw_with_routing(
        pipeline, args.prompt, config, seed=args.seed, negative_prompt=args.negative_prompt, progress=True
    )
    result = write_routing_maps(
        drawing, args.output, layers=args.layers, checkpoint=args.checkpoint, overwrite=args.overwrite
    )
    print(
        f"{len(layers)} MoE layers, {config.steps} steps of {config.width} x {config.height} px: {result['page']}"
    )
    if result["page_expert_steps"] < config.steps:
        print(
            f"the page holds {result['page_steps']} steps, {result['page_expert_steps']} of them with the choices of "
            "every single expert: more would not fit"
        )
    if args.json:
        print_json({**result, "checkpoint": args.checkpoint, "prompt": args.prompt})


if __name__ == "__main__":
    run(main)
