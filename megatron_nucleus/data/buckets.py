"""Aspect buckets: a few image shapes, so that every step of training has one static shape.

A bucket is named after its size in the 1024 px class (``1344x768``, width x height) and keeps that name at
every resolution. The seven shapes are those of Nucleus-Image (its team's release blog); those of other classes
follow by the rule of `size`. Width x height in px and image tokens, for tokens of 16 x 16 px:

    1024 px (published)       512 px (generated)       256 px (generated)
    1024x1024    4096         512x512     1024         256x256     256
    1344x768     4032         672x384     1008         336x192     252
    1184x896     4144         592x448     1036         288x224     252
    1248x832     4056         624x416     1014         320x208     260

and the last three turned, as portraits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from megatron_nucleus.utils.errors import ConfigError, nearest

BUCKETS = ("1024x1024", "1344x768", "768x1344", "1184x896", "896x1184", "1248x832", "832x1248")


class BucketSize(NamedTuple):
    """Image size of a bucket in training, and its image tokens."""

    width_px: int
    height_px: int
    tokens: int


def ratio(bucket: str) -> float:
    """Width / height of a bucket."""
    width, height = map(int, bucket.split("x"))
    return width / height


def assign(width_px: int, height_px: int) -> str:
    """The bucket that crops an upright image of this size least; of equals the first of `BUCKETS`."""
    aspect = width_px / height_px
    return min(BUCKETS, key=lambda b: abs(math.log(aspect / ratio(b))))


def kept_frac(width_px: int, height_px: int, bucket: str) -> float:
    """Share of the image's area that the centre crop to the bucket keeps, in (0, 1]."""
    quotient = width_px / height_px / ratio(bucket)
    return min(quotient, 1 / quotient)


@functools.lru_cache(maxsize=256)
def size(bucket: str, base_px: int, multiple_px: int, named: str = "resolution_px") -> tuple[int, int]:
    """(width, height) in px of a bucket in the class ``base_px``, both multiples of ``multiple_px``.

    Of all pairs of multiples the one that minimises |log(ratio error)| + |log(area / base_px^2)| / 2: the
    shape counts more than the area. At 1024 px and multiples of 16 this gives the published sizes. A portrait
    bucket is its landscape twin turned. With few multiples per side, as at 32 px, two buckets may get the
    same size; they stay separate buckets.

    Args:
        multiple_px: codec stride x patch size.
        named: setting that ``base_px`` comes from, for the message.

    Raises:
        ConfigError: unknown bucket, or a resolution that is no positive multiple of ``multiple_px``.
    """
    if bucket not in BUCKETS:
        raise ConfigError(
            f"unknown aspect bucket {bucket!r}{nearest(bucket, BUCKETS)}; one of {', '.join(BUCKETS)}"
        )
    if base_px <= 0 or multiple_px <= 0 or base_px % multiple_px:
        raise ConfigError(
            f"{named} {base_px} is not a positive multiple of {multiple_px} (codec stride x patch "
            f"size); use {max(1, round(base_px / max(multiple_px, 1))) * max(multiple_px, 1)}"
        )
    aspect = ratio(bucket)
    if aspect < 1:
        height, width = _best(1 / aspect, base_px // multiple_px)
    else:
        width, height = _best(aspect, base_px // multiple_px)
    return width * multiple_px, height * multiple_px


def _best(aspect: float, base: int) -> tuple[int, int]:
    """Landscape (width, height) in multiples; ties go to the smaller width."""
    candidates = []
    for width in range(base, math.ceil(base * math.sqrt(aspect)) + 2):
        for height in {max(1, math.floor(width / aspect)), max(1, math.ceil(width / aspect))}:
            shape_error = abs(math.log(width / height / aspect))
            area_error = abs(math.log(width * height / (base * base)))
            candidates.append((round(shape_error + area_error / 2, 12), width, height))
    _, width, height = min(candidates)
    return width, height


def merge_small(counts: Mapping[str, int], min_images: int) -> dict[str, str]:
    """Which bucket each non-empty bucket ends up in, so that none holds fewer than ``min_images``.

    The smallest bucket joins the remaining one with the nearest ratio, again and again; the last bucket stays
    whatever its size. Returns ``{bucket: final bucket}`` for every bucket with images.
    """
    final = {bucket: bucket for bucket in BUCKETS if counts.get(bucket, 0)}
    sizes = {bucket: counts[bucket] for bucket in final}
    while len(sizes) > 1:
        smallest = min(sizes, key=lambda b: (sizes[b], BUCKETS.index(b)))
        if sizes[smallest] >= min_images:
            break
        moved = sizes.pop(smallest)
        target = min(sizes, key=lambda b: abs(math.log(ratio(b) / ratio(smallest))))
        sizes[target] += moved
        final = {bucket: target if f == smallest else f for bucket, f in final.items()}
    return final
