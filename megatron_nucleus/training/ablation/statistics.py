"""Means, spreads and paired differences over seeds, and what may be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom (any table of it; beyond 30 the normal's).
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NO_DIFFERENCE = "no difference seen at this size"


class Spread(NamedTuple):
    """Mean over n values and their sample standard deviation (n - 1 in the denominator; None for one value)."""

    n: int
    mean: float
    std: float | None


class Difference(NamedTuple):
    """Mean over n pairs of (arm - baseline), its standard error, and half the width of its 95 % interval (t)."""

    n: int
    mean: float
    standard_error: float | None
    half_width_95: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    return Spread(
        len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    )


def paired_difference(baseline: Mapping[int, float], arm: Mapping[int, float]) -> Difference | None:
    """arm - baseline over the seeds that both have; None without such a seed.

    Runs of one seed share data order, noise and noise levels, which cancel in the difference.
    """
    pairs = spread([arm[seed] - baseline[seed] for seed in arm if seed in baseline])
    if pairs is None:
        return None
    if pairs.std is None:
        return Difference(1, pairs.mean, None, None)
    error = pairs.std / math.sqrt(pairs.n)
    quantile = T_975[pairs.n - 2] if pairs.n - 1 <= len(T_975) else 1.960
    return Difference(pairs.n, pairs.mean, error, quantile * error)


def verdict(difference: Difference | None, lower_is_better: bool) -> str:
    """In words: nothing below 2 standard errors; beyond, whether the 95 % interval of so few seeds excludes 0."""
    if difference is None or difference.standard_error is None:
        return "too few seeds"
    size = abs(difference.mean)
    if size < 2 * difference.standard_error or size == 0:
        return NO_DIFFERENCE
    word = "better" if (difference.mean < 0) == lower_is_better else "worse"
    if size <= difference.half_width_95:
        return f"{word} by more than 2 standard errors, but within the 95 % interval of {difference.n} seeds"
    return word
