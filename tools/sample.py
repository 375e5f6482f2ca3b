"""Draw pictures from a checkpoint: native (a run, one step, a merged folder) or diffusers.

Settings that are not given are those stored in the checkpoint. Pictures of one prompt follow each other; picture
number i, which is file 0000i.png, uses seed + i. Writes DIR/00000.png, ..., DIR/samples.jsonl and DIR/grid.png,
with --routing-stats DIR/routing.json, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_nucleus.evaluation.allocation import StepMeter, moe_layers
from megatron_nucleus.inference.flags import add_machine_flags, add_sampling_flags, pipeline_of, sampling_of
from megatron_nucleus.inference.outputs import check_folder, read_prompts, write_samples
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.inference.sampler import SamplerConfig
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_json_atomic


def build_parser() -> Parser:
    """Every flag of the program."""
    parser = Parser(prog="tools/sample.py", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="run, step, merged, diffusers or pipeline folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help='one prompt; "" is the empty prompt')
    what.add_argument(
        "--prompts", metavar="FILE", help='one prompt per line (blank ones skipped), or .jsonl with "prompt"'
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the pictures of an earlier job in DIR"
    )
    parser.add_argument(
        "--routing-stats", action="store_true",
        help="also write DIR/routing.json: what the experts did in each step, over all pictures",
    )  # fmt: skip
    add_sampling_flags(parser).add_argument(
        "--samples-per-prompt", type=int, default=1, metavar="N", help="pictures a prompt [1]"
    )
    add_machine_flags(parser).add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="pictures drawn at once [16]"
    )
    add_json_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, draw, print."""
    args = build_parser().parse_args(argv)
    if args.prompts is not None:
        prompts, blank_lines = read_prompts(args.prompts)
        if blank_lines:
            print(f"{args.prompts}: {len(prompts)} prompts, {blank_lines} blank lines skipped")
    else:
        prompts = [args.prompt]
    check_folder(args.output, args.overwrite)  # before a model is loaded
    pipeline = pipeline_of(args)
    config = sampling_of(args, pipeline)
    meter = _step_meter(pipeline, config, args.checkpoint) if args.routing_stats else None
    result = write_samples(
        pipeline,
        prompts,
        args.output,
        config=config,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.seed,
        negative_prompt=args.negative_prompt,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        on_routing=meter,
    )
    if meter is not None:
        write_json_atomic(Path(args.output) / "routing.json", meter.document())
    print(
        f"{result['images']} pictures of {config.width} x {config.height} px in {result['seconds']:.1f} s: "
        f"{result['output']}, overview {result['grid']}"
    )
    if args.json:
        print_json({**result, "checkpoint": args.checkpoint})


def _step_meter(pipeline: Pipeline, config: SamplerConfig, checkpoint: str) -> StepMeter:
    shape, unit = pipeline.model.shape, pipeline.size_unit_px
    if not moe_layers(shape):
        raise ConfigError(f"--routing-stats: checkpoint {checkpoint} has no MoE layers; leave the flag out")
    device = next(pipeline.model.parameters()).device
    return StepMeter(shape, (config.height // unit, config.width // unit), device)


if __name__ == "__main__":
    run(main)
