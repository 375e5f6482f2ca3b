"""Flags that the programs around a sampler share."""

from __future__ import annotations

import argparse

from megatron_nucleus.core.precision.expert_weights import CHOICES
from megatron_nucleus.inference.pipeline import Pipeline, load_pipeline
from megatron_nucleus.inference.sampler import SamplerConfig
from megatron_nucleus.utils.devices import DTYPES


def add_sampling_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of `sampling_of`, ``--seed`` and ``--negative-prompt``; returns their group."""
    stored = "[default: the checkpoint's]"
    group = parser.add_argument_group("sampling")
    group.add_argument("--height", type=int, metavar="N", help=f"height of a picture [px] {stored}")
    group.add_argument("--width", type=int, metavar="N", help=f"width of a picture [px] {stored}")
    group.add_argument("--steps", type=int, metavar="N", help=f"denoising steps {stored}")
    group.add_argument("--guidance", type=float, metavar="X", help=f"guidance; 1 or less = none {stored}")
    group.add_argument("--shift", type=float, metavar="X", help=f"shift of the noise levels {stored}")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first picture [0]")
    group.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to steer away from [the empty prompt]"
    )
    return group


def add_machine_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of `pipeline_of`; returns their group."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N [auto]")
    group.add_argument("--dtype", choices=tuple(DTYPES), help="precision of the model [as stored]")
    group.add_argument(
        "--expert-weights", choices=CHOICES, default="stored",
        help="fp8 = round the routed experts to 8 bits when they are loaded [stored]",
    )  # fmt: skip
    group.add_argument("--codec-path", metavar="PATH", help="folder or hub id of the Qwen-Image VAE")
    group.add_argument("--text-encoder-path", metavar="PATH", help="folder or hub id of Qwen3-VL")
    group.add_argument(
        "--text-encoder-device", metavar="NAME", help="where the text encoder runs [with the model]"
    )
    return group


def pipeline_of(args: argparse.Namespace) -> Pipeline:
    """The pipeline of ``--checkpoint`` (errors as `load_pipeline`)."""
    return load_pipeline(
        args.checkpoint,
        device=args.device,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        codec_path=args.codec_path,
        text_encoder_path=args.text_encoder_path,
        expert_weights=args.expert_weights,
        text_encoder_device=args.text_encoder_device,
    )


def sampling_of(args: argparse.Namespace, pipeline: Pipeline) -> SamplerConfig:
    """The checkpoint's settings with the given flags on top (errors as `Pipeline.settings`)."""
    return pipeline.settings(
        height=args.height, width=args.width, steps=args.steps, guidance=args.guidance, shift=args.shift
    )
