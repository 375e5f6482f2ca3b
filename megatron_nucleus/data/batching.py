"""Of every aspect bucket: how large its images are, how many tokens that makes, and how many a step draws."""

from __future__ import annotations

from megatron_nucleus.data import buckets
from megatron_nucleus.data.buckets import BucketSize
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.utils.errors import ConfigError


def bucket_sizes(corpus: Corpus, resolution_px: int, multiple_px: int) -> dict[str, BucketSize]:
    """Sizes of the corpus' buckets. Of encoded data those that it was encoded at, whatever the arguments say.

    Args:
        resolution_px: side of the square bucket. multiple_px: codec stride x patch size, one token's side.

    Raises:
        ConfigError: a resolution that does not fit, or encoded data that does not say its token size.
    """
    base_px, multiple_px = _scale(corpus, resolution_px, multiple_px)
    sizes = {b: buckets.size(b, base_px, multiple_px) for b in corpus.buckets}
    return {b: BucketSize(w, h, (w // multiple_px) * (h // multiple_px)) for b, (w, h) in sizes.items()}


def batch_samples(
    corpus: Corpus,
    resolution_px: int,
    multiple_px: int,
    global_batch_size: int,
    bucket_batch_multiple: int | None,
) -> dict[str, int]:
    """Images that a step of each bucket draws over all ranks; does not depend on the number of ranks.

    Without a multiple every bucket draws ``global_batch_size``. With multiple N it draws
    ``global_batch_size * T_square / T_bucket`` rounded to a multiple of N (half up, at least N), T being image
    tokens, so that all steps have about the same number of tokens.
    """
    if bucket_batch_multiple is None:
        return dict.fromkeys(corpus.buckets, global_batch_size)
    base_px, token_px = _scale(corpus, resolution_px, multiple_px)
    step_tokens = global_batch_size * (base_px // token_px) ** 2
    drawn = {}
    for bucket, size in bucket_sizes(corpus, resolution_px, multiple_px).items():
        piece = size.tokens * bucket_batch_multiple
        drawn[bucket] = max(1, (2 * step_tokens + piece) // (2 * piece)) * bucket_batch_multiple
    return drawn


def _scale(corpus: Corpus, resolution_px: int, multiple_px: int) -> tuple[int, int]:
    """(side of the square bucket, side of a token) in px."""
    if corpus.encoded is None:
        return resolution_px, multiple_px
    if "multiple_px" not in corpus.encoded:
        raise ConfigError(
            f"--data-path {corpus.root}: was encoded before token sizes were recorded; run tools/encode.py again"
        )
    return corpus.encoded["resolution_px"], corpus.encoded["multiple_px"]
