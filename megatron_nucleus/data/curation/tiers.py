"""Tiers A1-A5 by quality and episodic buckets B1-B8 by quality and size (Nucleus-Image's data blog).

A tier comes from a score: by the published edges, or, for a scorer on another scale, by rank with the published shares.

A bucket comes from z = 0.6 norm(tier) + 0.4 norm(size rank), drawn with p = softmax(-(z - mu)^2 / (2 sigma^2 T)) over
the centres mu of the buckets; tier and size rank run from 0 to 1, and equal sizes share a rank. How z is brought to the
centres' scale is not published: here by the affine map that gives it their mean and standard deviation. With the
published tier shares that map leaves 6 % of the images above the cap per bucket before it acts; the theoretical range
of z mapped to the centres' range leaves 23 %, and z in [0, 1], as the formula stands, 49 % (three quarters of the
images then fall into two buckets).

The soft cap works on expected counts, which follow from how many images have which tier and size: what is too much for
a bucket moves on, in rounds, to the buckets that have room, by the same formula. So a draw depends on the id and on the
set of images, never on their order; the count in a full bucket differs from the cap by the luck of the draw,
sqrt(cap) or less.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

EDGES = (5.0, 5.5, 6.0, 6.5, 6.8)  # lowest aesthetic score of A1 .. A5 (published)
SHARES = (215.0, 191.0, 140.0, 100.0, 50.0)  # million images in A1 .. A5 (published)
CENTRES = np.linspace(-1.75, 1.75, len(EPISODE_BUCKETS))  # published
MAX_BUCKET_SHARE = 0.13  # about 90 million (published) of the 696 million images that the tiers add up to
SIGMA = 0.5  # not published; own choice: the distance of two centres, so that neighbours overlap and others hardly do
_CELLS_PER_STEP = 1 << 18  # own choice: 16 MB of probabilities at a time
_MERGE_AT = 1 << 20  # own choice


@dataclasses.dataclass(frozen=True)
class TiersConfig:
    """How images get a tier by quality and an episodic bucket by quality and size."""

    tier_by: str = knob(
        "thresholds",
        "thresholds: by tier_edges, for scores on the published scale; shares: by rank, the worst images in A1, with "
        "tier_shares",
        choices=("thresholds", "shares"),
    )
    tier_scorer: str = knob("aesthetic", "name of the score that decides the tier")
    tier_edges: tuple[float, ...] = knob(EDGES, "lowest score of A1 to A5; images below A1 get no tier")
    tier_shares: tuple[float, ...] = knob(SHARES, "parts of the images that A1 to A5 get; any unit")
    keep_untiered: bool = knob(
        False, "keep images below A1 or without a score, without tier and bucket, instead of rejecting them"
    )
    bucket_tier_weight: float = knob(0.6, "weight of the tier in z; the size rank has the rest")
    bucket_sigma: float = knob(SIGMA, "width of a bucket; two centres lie 0.5 apart", unit="standardised z")
    bucket_temperature: float = knob(0.7, "T of the softmax; above 1 evens the buckets out")
    max_bucket_share: float = knob(
        MAX_BUCKET_SHARE, "share of the images from which on a bucket passes them to others; 1: no cap"
    )

    def __post_init__(self) -> None:
        for name in ("tier_edges", "tier_shares"):
            if len(getattr(self, name)) != len(TIERS):
                raise ConfigError(f"{name} {getattr(self, name)}: one number per tier, {len(TIERS)}")
        edges = np.asarray(self.tier_edges)
        if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ConfigError(f"tier_edges {self.tier_edges}: finite and ascending")
        if not all(0 < share < math.inf for share in self.tier_shares):
            raise ConfigError(f"tier_shares {self.tier_shares}: above 0 and finite")
        if not 0 <= self.bucket_tier_weight <= 1:
            raise ConfigError(f"bucket_tier_weight {self.bucket_tier_weight}: 0 to 1")
        for name in ("bucket_sigma", "bucket_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)}: above 0 and finite")
        least = 1 / len(EPISODE_BUCKETS)
        if not least <= self.max_bucket_share <= 1:
            raise ConfigError(
                f"max_bucket_share {self.max_bucket_share}: {least} to 1 (below, the buckets cannot hold all images)"
            )


def tier_of(scores: np.ndarray, edges: Iterable[float] = EDGES) -> np.ndarray:
    """Tier of each score [float32, n] by edges: int8 [n], 0 is A1; -1 below the first edge and for NaN (no score)."""
    lowest = np.asarray(tuple(edges), np.float32)  # as scores are stored, so that a score of 6.8 is in A5
    tiers = np.searchsorted(lowest, scores, side="right").astype(np.int8) - np.int8(1)
    return np.where(np.isnan(scores), np.int8(-1), tiers)


def tier_of_rank(scores: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Tier of each score [float32, n] by what `share_edges` found: int8 [n], 0 is A1; -1 for NaN (no score)."""
    tiers = np.searchsorted(highest, scores, side="left").astype(np.int8)
    return np.where(np.isnan(scores), np.int8(-1), tiers)


def share_edges(batches: Callable[[], Iterator[np.ndarray]], shares: Iterable[float] = SHARES) -> np.ndarray:
    """Highest score of A1 to A4 [float32, 4], so that the tiers have these shares of all scores.

    Equal scores get equal tiers: of a tie across an edge all belong to the lower tier. Exact, in two passes and 3 MB:
    the upper half of the bits of the edges first, then the lower half.

    Args:
        batches: gives all scores, finite [float32], in any order; called twice.
    """
    upper = np.zeros(1 << 16, np.int64)
    for scores in batches():
        upper += np.bincount(_ordered_bits(scores) >> 16, minlength=1 << 16)
    parts = np.asarray(tuple(shares), np.float64)
    total = int(upper.sum())
    if total == 0:
        return np.full(len(parts) - 1, np.inf, np.float32)
    # of the k-th smallest score; the small number keeps 0.3 * 10 from becoming the 4th smallest
    ranks = np.ceil(np.cumsum(parts)[:-1] / parts.sum() * total - 1e-6).clip(1).astype(np.int64)
    ends = np.cumsum(upper)
    tops = np.searchsorted(ends, ranks)
    lower = {int(top): np.zeros(1 << 16, np.int64) for top in tops}
    for scores in batches():
        bits = _ordered_bits(scores)
        for top, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    found = []
    for top, rank in zip(tops.tolist(), ranks.tolist(), strict=True):
        before = int(ends[top] - upper[top])
        found.append(top << 16 | int(np.searchsorted(np.cumsum(lower[top]), rank - before)))
    return _from_ordered_bits(np.asarray(found, np.uint32))


def _ordered_bits(scores: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _from_ordered_bits(ordered: np.ndarray) -> np.ndarray:
    bits = np.where(ordered >> 31 == 1, ordered & np.uint32((1 << 31) - 1), ~ordered)
    return bits.astype(np.uint32).view(np.float32)


class Histogram:
    """How often each whole number occurs among numbers that arrive in batches; memory grows with distinct ones."""

    def __init__(self) -> None:
        self._values, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_values = 0

    def add(self, values: np.ndarray) -> None:
        """Count ``values`` [int64, any length]."""
        found, counts = np.unique(values.astype(np.int64), return_counts=True)
        self._waiting.append((found, counts))
        self._waiting_values += len(found)
        if self._waiting_values > max(_MERGE_AT, len(self._values)):
            self._merge()

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values, ascending, and their counts [int64]."""
        self._merge()
        return self._values, self._counts

    def _merge(self) -> None:
        groups = [(self._values, self._counts), *self._waiting]
        values = np.concatenate([v for v, _ in groups])
        counts = np.concatenate([c for _, c in groups])
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
        self._values = values[first]
        self._counts = np.add.reduceat(counts, first) if len(first) else counts
        self._waiting, self._waiting_values = [], 0


def cell(tiers: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """One number for tier (0 is A1) and pixel count of each image: what `plan_buckets` wants counted [int64]."""
    return pixels.astype(np.int64) * len(TIERS) + tiers


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """The probabilities of the buckets for every tier and size; made by `plan_buckets`.

    Attributes:
        pixels: distinct pixel counts, ascending [int64, P]; ranks: their place from 0 to 1 [float64, P].
        mean, scale: of the map from weighted mean to standardised z.
        rounds: [float64, rounds, 8], the share of what arrives in a round that a bucket accepts; 0: it is full.
        spread: 2 sigma^2 T. tier_weight: of the tier in z.
    """

    pixels: np.ndarray
    ranks: np.ndarray
    mean: float
    scale: float
    rounds: np.ndarray
    spread: float
    tier_weight: float

    def standardised(self, tiers: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """z [float64, n] of images that were counted."""
        ranks = self.ranks[np.searchsorted(self.pixels, pixels)]
        return (_weighted(tiers, ranks, self.tier_weight) - self.mean) * self.scale

    def probabilities(self, z: np.ndarray) -> np.ndarray:
        """Of each bucket [float64, n, 8], after the cap; rows add up to 1."""
        out = np.zeros((len(z), len(CENTRES)))
        left = np.ones(len(z))
        for accepted in self.rounds:
            placed = left[:, None] * _softmax(z, self.spread, accepted > 0) * accepted
            out += placed
            left = left - placed.sum(axis=1)
        return out / out.sum(axis=1, keepdims=True)

    def draw(self, ids: Iterable[str], tiers: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Bucket of each image, from its id: int8 [n], 0 is B1."""
        ends = np.cumsum(self.probabilities(self.standardised(tiers, pixels)), axis=1)[:, :-1]
        return (uniforms(ids)[:, None] >= ends).sum(axis=1).astype(np.int8)


def plan_buckets(counted: Histogram, settled: np.ndarray, config: TiersConfig) -> BucketPlan:
    """Fix the scale of z and who goes where when a bucket is full.

    Args:
        counted: of the `cell` of every image that a bucket is drawn for.
        settled: images that have their bucket already, per bucket [int64, 8]; they count towards the cap.
    """
    cells, counts = counted.table()
    tiers, all_pixels = cells % len(TIERS), cells // len(TIERS)
    pixels, ranks = _size_ranks(all_pixels, counts)
    z = _weighted(tiers, ranks[np.searchsorted(pixels, all_pixels)], config.bucket_tier_weight)
    total = int(counts.sum())
    mean = float(z @ counts) / total if total else 0.0
    deviation = math.sqrt(float((z - mean) ** 2 @ counts) / total) if total else 0.0
    scale = float(CENTRES.std()) / deviation if deviation > 1e-9 else 0.0  # all alike: in the middle
    spread = 2 * config.bucket_sigma**2 * config.bucket_temperature
    room = np.maximum(config.max_bucket_share * (total + int(settled.sum())) - settled, 0.0)
    rounds = _fill((z - mean) * scale, counts, room, spread)
    return BucketPlan(pixels, ranks, mean, scale, rounds, spread, config.bucket_tier_weight)


def _size_ranks(all_pixels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pixel counts and their rank among all images, 0 to 1; equal sizes share the middle of their ranks."""
    pixels, first = np.unique(all_pixels, return_index=True)
    if not len(pixels):
        return pixels, np.empty(0)
    images = np.add.reduceat(counts, first)
    below = np.cumsum(images) - images
    return pixels, (below + (images - 1) / 2) / max(int(images.sum()) - 1, 1)


def _weighted(tiers: np.ndarray, ranks: np.ndarray, tier_weight: float) -> np.ndarray:
    return tier_weight * tiers / (len(TIERS) - 1) + (1 - tier_weight) * ranks


def _softmax(z: np.ndarray, spread: float, is_open: np.ndarray) -> np.ndarray:
    """exp(-(z - mu)^2 / spread) over the open buckets, rows adding up to 1 [float64, n, 8]."""
    logits = np.where(is_open, -((z[:, None] - CENTRES) ** 2) / spread, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _fill(z: np.ndarray, counts: np.ndarray, room: np.ndarray, spread: float) -> np.ndarray:
    """Rounds of acceptance by expected counts: a bucket takes what it has room for and passes on the rest.

    Every round but the last closes a bucket, so there are at most as many rounds as buckets.
    """
    left, room = counts.astype(np.float64), room.copy()
    is_open = room > 0
    rounds = []
    steps = [slice(i, i + _CELLS_PER_STEP) for i in range(0, len(z), _CELLS_PER_STEP)]
    while is_open.any():
        arrived = np.zeros(len(room))
        for step in steps:
            arrived += left[step] @ _softmax(z[step], spread, is_open)
        too_much = is_open & (arrived > room)
        accepted = np.where(too_much, room / np.maximum(arrived, 1e-300), is_open.astype(np.float64))
        rounds.append(accepted)
        if not too_much.any():
            break
        for step in steps:
            left[step] *= 1 - _softmax(z[step], spread, is_open) @ accepted
        room = room - arrived * accepted
        is_open = is_open & ~too_much
    return np.array(rounds)


def uniforms(ids: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) from each id [float64]; independent of `index.partition_key` and of every other draw."""
    digests = b"".join(
        hashlib.blake2b(sample_id.encode(), digest_size=8, person=b"episode_bucket").digest()
        for sample_id in ids
    )
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
