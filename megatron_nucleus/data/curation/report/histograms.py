"""Counts of values in fixed bins: what a chart needs of any number of images, in the same small memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

MAX_BINS = 32  # own choice: more are no longer told apart in a chart of 360 px
_MAX_NAMES = 10_000  # different licences and the like that are told apart; own choice


class Histogram:
    """How many kept and other images have a value in each bin.

    Bin i holds edges[i] <= value < edges[i + 1], the last one also its upper edge; the outer edges may be infinite.

    Attributes:
        edges: ascending float64 [bins + 1]. counts: int64 [2, bins], kept images first. log: whether an axis of equal
            bins is logarithmic. whole: whether the values are whole numbers. ticks: value -> text. sums: of finite
            values, kept and other [float64, 2]; sizes: how many they are [int64, 2].
    """

    def __init__(
        self,
        edges: Iterable[float],
        *,
        log: bool = False,
        whole: bool = False,
        ticks: Mapping[float, str] | None = None,
    ):
        """ticks: values to write below an axis, and how; by default some of the edges."""
        self.edges = np.asarray(tuple(edges), np.float64)
        self.log, self.whole, self.ticks = log, whole, dict(ticks or {})
        self.counts = np.zeros((2, len(self.edges) - 1), np.int64)
        self.sums, self.sizes = np.zeros(2), np.zeros(2, np.int64)

    def add(self, values: np.ndarray, kept: np.ndarray | bool) -> None:
        """Count values; NaN is no value. kept: of each value, or of all.

        Raises:
            AssertionError: a value outside the edges; whoever chose them did not know the values.
        """
        known = ~np.isnan(values)
        groups = np.broadcast_to(np.asarray(kept, bool), values.shape)
        for row, chosen in enumerate((values[known & groups], values[known & ~groups])):
            # Edges as precise as the values, so that a stored 6.8 lies in the bin that begins with 6.8.
            edges = self.edges.astype(chosen.dtype) if chosen.dtype.kind == "f" else self.edges
            bins = np.searchsorted(edges, chosen, side="right") - 1
            bins[chosen == edges[-1]] = len(edges) - 2
            if len(bins) and not (bins.min() >= 0 and bins.max() < len(edges) - 1):
                raise AssertionError(f"values outside {self.edges[0]:g} to {self.edges[-1]:g}")
            self.counts[row] += np.bincount(bins, minlength=len(edges) - 1)
            finite = chosen[np.isfinite(chosen)]
            self.sums[row] += float(finite.sum(dtype=np.float64))
            self.sizes[row] += len(finite)

    @property
    def kept(self) -> np.ndarray:
        """Counts of kept images [int64, bins]."""
        return self.counts[0]

    @property
    def other(self) -> np.ndarray:
        """Counts of the images that were not kept [int64, bins]."""
        return self.counts[1]

    def mean(self) -> float | None:
        """Mean of the kept images' finite values, None without any."""
        return float(self.sums[0] / self.sizes[0]) if self.sizes[0] else None

    def place(self, value: float) -> float | None:
        """Where a value lies on an axis of equal bins, in bins from the left; None outside the finite edges."""
        finite = np.isfinite(self.edges)
        if self.log:
            finite &= self.edges > 0
        edges, places = self.edges[finite], np.flatnonzero(finite)
        if not len(edges) or not edges[0] <= value <= edges[-1]:
            return None
        if self.log:
            return float(np.interp(math.log(value), np.log(edges), places))
        return float(np.interp(value, edges, places))


class Range:
    """Smallest and largest finite value of what arrives in batches."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take ``values`` [float] in; NaN and infinities do not count."""
        finite = values[np.isfinite(values)]
        if len(finite):
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def edges(self) -> np.ndarray:
        """At most `MAX_BINS` equal bins at round numbers that hold all values; two when there were none."""
        if self.low > self.high:
            return round_edges(0.0, 1.0)
        return round_edges(self.low, self.high)


def round_edges(low: float, high: float) -> np.ndarray:
    """Edges at multiples of 1, 2 or 5 times a power of ten that hold ``low`` to ``high`` [float64]."""
    span = high - low or max(abs(low), 1.0) / 4
    power = math.floor(math.log10(span / MAX_BINS))
    for digit, exponent in ((d, power + e) for e in range(3) for d in (1, 2, 5)):
        step = digit * 10.0**exponent
        first, last = math.floor(low / step), math.floor(high / step) + 1
        if last - first <= MAX_BINS:
            # float32 like the values: an edge just above the lowest value would leave it outside
            return np.array(
                [
                    round(n * step, max(0, -exponent))
                    for n in range(first - _below(first, step, low), last + 1)
                ]
            )
    raise AssertionError(f"no bins for {low} to {high}")


def _below(first: int, step: float, low: float) -> int:
    return int(np.float32(first * step) > np.float32(low))


class Names:
    """How often each name occurs; beyond 10,000 different ones the new ones are counted together."""

    def __init__(self) -> None:
        self.counts: dict[Any, int] = {}
        self.rest = 0

    def add(self, counted: Iterable[tuple[Hashable, int]]) -> None:
        """Add (name, number) pairs."""
        for name, number in counted:
            if name in self.counts or len(self.counts) < _MAX_NAMES:
                self.counts[name] = self.counts.get(name, 0) + number
            else:
                self.rest += number

    def largest(self, limit: int) -> list[tuple[str, int]]:
        """Names and numbers, the most frequent first; those beyond ``limit`` in one line."""
        ordered = sorted(self.counts.items(), key=lambda pair: (-pair[1], str(pair[0])))
        shown, others = ordered[:limit], ordered[limit:]
        rows = [("none" if name is None else str(name), number) for name, number in shown]
        if others or self.rest:
            more = f"{len(others):,}" if not self.rest else f"more than {len(others):,}"
            rows.append((f"{more} others", sum(n for _, n in others) + self.rest))
        return rows
