"""Hashes in memory -> all pairs within a Hamming distance.

Per table, the hashes with the key moved to the front are sorted: candidates are neighbours, and the exclusive or of
two neighbours is small where their keys agree. A pair is reported by the first of its tables only, so that nothing
has to remember pairs. The work is bounded where many hashes share a key (a *hot* run): such a run is searched again
by tables over its remaining bits, or compared block by block, whichever costs less.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np

from megatron_nucleus.data.curation.near_duplicates.keys import HASH_BITS, Layout, layout

Pairs = tuple[np.ndarray, np.ndarray]  # uint64 [m] each: the hashes of m pairs

HOT_ROWS = 256  # a longer run is compared as a square, 30 times faster per pair than neighbour by neighbour
_CHUNK_ROWS = 1 << 15  # sorted hashes per step; with HOT_ROWS it bounds what one step can find
_SQUARE_ROWS = 512  # a square of 512 x 512 exclusive ors is 2 MB
_BATCH_PAIRS = 1 << 16  # finds are put together to at least so many
# Costs in comparisons of a square (2.4 ns each): of a neighbour, and of moving and sorting one row [measured].
_NEIGHBOUR_COST = 6
_ROW_COST = 40


@dataclasses.dataclass
class Work:
    """What a search has done, for its report and for forecasts; times are CPU seconds of the working thread.

    Attributes:
        row_tables: rows moved and sorted, once for each table. sort_s: for that and for the look at the next row.
        candidates: pairs with an equal key, once for each table. compared: distances taken of other rows than the
            next one. compare_s: for that.
        load_s: for reading rows and for collapsing equal hashes. loaded_rows: how many, once for each load.
        split_s: for writing partition files. split_rows, split_bytes: rows and bytes in them.
    """

    row_tables: int = 0
    sort_s: float = 0.0
    candidates: int = 0
    compared: int = 0
    compare_s: float = 0.0
    load_s: float = 0.0
    loaded_rows: int = 0
    split_s: float = 0.0
    split_rows: int = 0
    split_bytes: int = 0

    def add(self, other: Work) -> None:
        """Add ``other``'s numbers to these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Clock:
    """CPU seconds of this thread since the last call."""

    def __init__(self) -> None:
        self._last_s = time.thread_time()

    def lap_s(self) -> float:
        """Seconds since the last call."""
        before, self._last_s = self._last_s, time.thread_time()
        return self._last_s - before


def near_pairs(
    values: np.ndarray,
    max_distance: int,
    work: Work,
    tables: Iterable[int] | None = None,
    width_bits: int = HASH_BITS,
    hot_rows: int = HOT_ROWS,
) -> Iterator[Pairs]:
    """All pairs of ``values`` (uint64 [n], each once) within ``max_distance`` whose first table is in ``tables``.

    Yields:
        Lower and higher value of each pair, in batches. The order depends on nothing but the arguments.
    """
    of = layout(max_distance, width_bits)
    for table in range(len(of.tables)) if tables is None else tables:
        for a, b in _batches(_table_pairs(values, of, table, max_distance, work, hot_rows)):
            a, b = of.from_front(a, table), of.from_front(b, table)
            first = of.first_table(a ^ b) == table
            a, b = a[first], b[first]
            if len(a):
                yield np.minimum(a, b), np.maximum(a, b)


def _batches(finds: Iterator[Pairs]) -> Iterator[Pairs]:
    """The same pairs, fewer arrays."""
    held: list[Pairs] = []
    count = 0
    for pair in finds:
        held.append(pair)
        count += len(pair[0])
        if count >= _BATCH_PAIRS:
            yield np.concatenate([a for a, _ in held]), np.concatenate([b for _, b in held])
            held, count = [], 0
    if held:
        yield np.concatenate([a for a, _ in held]), np.concatenate([b for _, b in held])


def _table_pairs(
    values: np.ndarray, of: Layout, table: int, max_distance: int, work: Work, hot_rows: int
) -> Iterator[Pairs]:
    """Near pairs with equal keys, key in front."""
    clock = Clock()
    front = of.to_front(values, table)
    front.sort()
    rest_bits = of.width_bits - of.key_bits(table)
    below = np.uint64(1 << rest_bits)  # the exclusive or of two hashes with equal keys
    hot = _hot_runs(front, below, hot_rows)
    work.row_tables += len(front)
    work.sort_s += clock.lap_s()
    for start in range(0, len(front) - 1, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(front) - 1)
        yield from _neighbours(front, start, stop, below, hot, max_distance, work)
    for start, stop in hot:
        high = front[start] & ~(below - np.uint64(1))
        for a, b in _hot_pairs(front[start:stop] ^ high, rest_bits, max_distance, work, hot_rows):
            yield a | high, b | high


def _hot_runs(front: np.ndarray, below: np.uint64, hot_rows: int) -> list[tuple[int, int]]:
    """(start, stop) of the runs of more than ``hot_rows`` equal keys in sorted ``front``."""
    firsts = []
    for start in range(0, len(front) - hot_rows, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(front) - hot_rows)
        different = front[start + hot_rows : stop + hot_rows] ^ front[start:stop]
        firsts.append(start + np.flatnonzero(different < below))
    starts = np.concatenate(firsts) if firsts else np.zeros(0, np.int64)
    if not len(starts):
        return []
    new_run = np.flatnonzero((front[starts[1:]] ^ front[starts[:-1]]) >= below) + 1
    edges = [0, *new_run.tolist(), len(starts)]
    return [(int(starts[i]), int(starts[j - 1]) + hot_rows + 1) for i, j in itertools.pairwise(edges)]


def _neighbours(
    front: np.ndarray,
    start: int,
    stop: int,
    below: np.uint64,
    hot: list[tuple[int, int]],
    max_distance: int,
    work: Work,
) -> Iterator[Pairs]:
    """Compare the rows of [start, stop) with the next one, the one after it, ... while keys agree."""
    clock = Clock()
    different = front[start + 1 : stop + 1] ^ front[start:stop]
    rows = np.flatnonzero(different < below)
    work.sort_s += clock.lap_s()
    if not len(rows):
        return
    different = different[rows]
    rows += start
    for first, last in hot:
        if first < stop and last > start:
            outside = (rows < first) | (rows >= last)
            rows, different = rows[outside], different[outside]
    gap = 1
    while len(rows):
        work.candidates += len(rows)
        work.compared += len(rows)
        near = np.flatnonzero(np.bitwise_count(different) <= max_distance)
        if len(near):
            found = rows[near]
            work.compare_s += clock.lap_s()
            yield front[found], front[found + gap]
            clock.lap_s()
        gap += 1
        if rows[-1] + gap >= len(front):
            rows = rows[: np.searchsorted(rows, len(front) - gap)]
        different = front[rows + gap] ^ front[rows]
        same = np.flatnonzero(different < below)
        rows, different = rows[same], different[same]
    work.compare_s += clock.lap_s()


def _hot_pairs(
    values: np.ndarray, width_bits: int, max_distance: int, work: Work, hot_rows: int
) -> Iterator[Pairs]:
    """All near pairs of a run with one key; values: uint64 [n], sorted, each once, without the key's bits."""
    work.candidates += len(values) * (len(values) - 1) // 2
    if _tables_pay(values, width_bits, max_distance):
        inner = Work()  # its candidates are a part of those just counted
        yield from near_pairs(values, max_distance, inner, None, width_bits, hot_rows)
        inner.candidates = 0
        work.add(inner)
        return
    clock = Clock()
    for i in range(0, len(values), _SQUARE_ROWS):
        for j in range(i, len(values), _SQUARE_ROWS):
            a, b = values[i : i + _SQUARE_ROWS], values[j : j + _SQUARE_ROWS]
            near = np.bitwise_count(a[:, None] ^ b[None, :]) <= max_distance
            rows, columns = np.nonzero(np.triu(near, 1) if i == j else near)
            work.compared += len(a) * len(b)
            if len(rows):
                work.compare_s += clock.lap_s()
                yield a[rows], b[columns]
                clock.lap_s()
    work.compare_s += clock.lap_s()


def _tables_pay(values: np.ndarray, width_bits: int, max_distance: int) -> bool:
    """Whether tables over the remaining bits cost less than comparing all with all: counted, not guessed."""
    of = layout(max_distance, width_bits)
    if min(width for _, width in of.blocks) < 1:
        return False
    everything = len(values) * (len(values) - 1) // 2
    cost = _ROW_COST * len(values) * len(of.tables)
    for table in range(len(of.tables)):
        if cost >= everything:
            return False
        keys = of.to_front(values, table) >> np.uint64(width_bits - of.key_bits(table))
        keys.sort()
        edges = np.flatnonzero(np.diff(keys, prepend=~keys[:1], append=~keys[-1:]))
        runs = np.diff(edges)
        cost += _NEIGHBOUR_COST * int((runs * (runs - 1) // 2).sum())
    return cost < everything
