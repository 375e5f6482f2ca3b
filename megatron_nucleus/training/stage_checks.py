"""What the resolution, the model and the data of a stage must be to each other; checked before the first step."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data import buckets
from megatron_nucleus.data.batching import bucket_sizes
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils.errors import ConfigError


def check_tokens(run: RunConfig, shape: ModelShape, corpus: Corpus, multiple_px: int) -> None:
    """Every image size of the run must give every expert tokens to choose from.

    Args:
        multiple_px: side of a token (codec stride x patch size).

    Raises:
        ConfigError: a resolution that tokens do not divide, or an image with fewer tokens than experts.
    """
    px = run.data.resolution_px
    if corpus.encoded is None:
        check_buckets(run, shape, corpus.buckets, multiple_px)
        return
    for bucket, size in bucket_sizes(corpus, px, multiple_px).items():
        _check_experts(shape, bucket, size.tokens, f"--resolution-px {px}")


def check_buckets(run: RunConfig, shape: ModelShape, names: Iterable[str], multiple_px: int) -> None:
    """`check_tokens` for images that are not encoded, of which only the aspect buckets are known.

    Args:
        names: buckets that the images fall into. multiple_px: side of a token (codec stride x patch size).
    """
    flags = {run.data.resolution_px: "--resolution-px"}
    for px in run.validation.valid_resolutions_px:
        flags.setdefault(px, "--valid-resolutions-px")
    for px, flag in flags.items():
        for bucket in names:
            width, height = buckets.size(bucket, px, multiple_px, flag)
            tokens = (width // multiple_px) * (height // multiple_px)
            _check_experts(shape, bucket, tokens, f"{flag} {px}")


def _check_experts(shape: ModelShape, bucket: str, tokens: int, resolution: str) -> None:
    routes = any(shape.is_moe(layer) for layer in range(shape.num_layers))
    if routes and tokens < shape.num_experts:
        raise ConfigError(
            f"--num-experts {shape.num_experts}: bucket {bucket} at {resolution} has {tokens} image tokens, and each "
            f"expert takes at least one of them; use at most {tokens} experts or a higher resolution"
        )
