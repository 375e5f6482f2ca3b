"""How many tokens and images a micro-batch has, from a configuration alone, before any data set is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.batching import batch_samples, bucket_sizes
from megatron_nucleus.data.buckets import BUCKETS
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils.errors import ConfigError

SQUARE = BUCKETS[0]
VAE_STRIDE_PX = 8  # of the Qwen-Image VAE, whose spec does not say it


class _AnyCorpus(NamedTuple):
    """As much of a `Corpus` as bucket sizes need: images of every bucket, not encoded."""

    buckets: tuple[str, ...] = BUCKETS
    encoded: None = None


def token_px(run: RunConfig, shape: ModelShape) -> int:
    """Side of an image token: codec stride x patch size."""
    return run.encoders.codec_spec().get("stride_px", VAE_STRIDE_PX) * shape.patch_size


def square_grid(run: RunConfig, grid: tuple[int, ...] | None, shape: ModelShape) -> tuple[int, int]:
    """Image tokens, rows and columns: ``grid``, or the square of ``--resolution-px`` through codec and patch.

    Raises:
        ConfigError: a resolution that tokens do not divide.
    """
    if grid is not None:
        return (grid[0], grid[1])
    stride_px = token_px(run, shape)
    if run.data.resolution_px % stride_px:
        raise ConfigError(
            f"--resolution-px {run.data.resolution_px}: must be a multiple of {stride_px} (codec stride x patch size)"
        )
    side = run.data.resolution_px // stride_px
    return (side, side)


def sizes_of(run: RunConfig, grid: tuple[int, ...] | None, shape: ModelShape) -> dict[str, int]:
    """Image tokens of every aspect bucket; with ``grid`` of that size alone, by the name of the square one."""
    rows, columns = square_grid(run, grid, shape)
    if grid is not None:
        return {SQUARE: rows * columns}
    sizes = bucket_sizes(_AnyCorpus(), run.data.resolution_px, token_px(run, shape))
    return {bucket: size.tokens for bucket, size in sizes.items()}


def per_bucket(run: RunConfig, sizes: dict[str, int], shape: ModelShape) -> dict[str, int]:
    """Images that a step draws of each bucket of ``sizes``, over all ranks."""
    total, multiple = run.training.global_batch_size, run.data.bucket_batch_multiple
    if len(sizes) == 1 or multiple is None:
        return dict.fromkeys(sizes, total)
    return batch_samples(_AnyCorpus(), run.data.resolution_px, token_px(run, shape), total, multiple)


def check_tokens(run: RunConfig, shape: ModelShape, tokens: Iterable[int]) -> None:
    """Every image must give every expert a token.

    Raises:
        ConfigError: it does not.
    """
    least = min(tokens)
    if any(map(shape.is_moe, range(shape.num_layers))) and least < shape.num_experts:
        raise ConfigError(
            f"--num-experts {shape.num_experts}: an image of {least} tokens (--resolution-px "
            f"{run.data.resolution_px}) gives each expert less than one; use fewer experts or a higher resolution"
        )
