"""Files of hashes -> files of pairs, one task at a time: the pieces that run in any process, in any order.

Tables whose first block is the same are served by one set of partition files: `split_rows` sorts a span of the input
by the leading bits of that block, `search_partition` reads one partition of all spans and searches its tables. Each
task writes one file, under a temporary name that is then renamed, and does nothing where that file is there already.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megatron_nucleus.data.curation.near_duplicates.keys import KEY_BLOCKS, Layout, layout
from megatron_nucleus.data.curation.near_duplicates.pairs import HOT_ROWS, Clock, Work, near_pairs
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import open_atomic

# A pair of rows, low < high, and the Hamming distance of their hashes; 9 bytes.
PAIR = np.dtype([("low", "<i4"), ("high", "<i4"), ("distance", "u1")])
BYTES_PER_ROW = 40  # that a search holds at most for each row it has loaded [measured: 32 to 35]
SPLIT_BYTES_PER_ROW = 40  # the same of a split [measured: 30]
FILE_BYTES_PER_ROW = 12  # of a partition file: hash and row
_CHUNK_ROWS = 1 << 16  # of a pass over loaded rows, so that it needs little memory of its own

Rows = tuple[np.ndarray, np.ndarray]  # hashes, uint64 [m]; their row numbers, int32 [m]
Read = Callable[[], Iterator[Rows]]  # the same rows at every call, in pieces


class SplitTask(NamedTuple):
    """Sort rows [start, stop) of the array in ``source`` (.npy) by the first ``partition_bits`` bits of a block."""

    source: str
    start: int
    stop: int
    block: int
    partition_bits: int
    max_distance: int
    output: str


def split_rows(task: SplitTask) -> Work:
    """Write ``task.output``: int64 offsets [2^partition_bits + 1], hashes uint64 [m], rows int32 [m]."""
    work = Work()
    if os.path.exists(task.output):
        return work
    clock = Clock()
    hashes = np.array(np.load(task.source, mmap_mode="r")[task.start : task.stop])
    of = layout(task.max_distance)
    spare_bits = of.blocks[task.block][1] - task.partition_bits
    keys = (of.block_values(hashes, task.block) >> spare_bits).astype(np.uint16)
    counts = np.bincount(keys, minlength=1 << task.partition_bits)
    order = np.argsort(keys, kind="stable")  # numpy takes a radix sort for 16-bit keys
    with open_atomic(task.output) as file:
        np.concatenate([[0], np.cumsum(counts)]).astype("<i8").tofile(file)
        hashes[order].tofile(file)
        (order + task.start).astype("<i4").tofile(file)
    work.split_s, work.split_rows = clock.lap_s(), len(hashes)
    work.split_bytes = os.path.getsize(task.output)
    return work


def _read_split(path: str, partition: int, partition_bits: int) -> Rows:
    count = (1 << partition_bits) + 1
    offsets = np.fromfile(path, "<i8", count)
    expected = 8 * count + FILE_BYTES_PER_ROW * int(offsets[-1]) if len(offsets) == count else None
    if expected != os.path.getsize(path):
        raise DataError(f"{path}: damaged partition file; remove it and start again")
    start, stop, rows = int(offsets[partition]), int(offsets[partition + 1]), int(offsets[-1])
    hashes = np.fromfile(path, "<u8", stop - start, offset=8 * count + 8 * start)
    return hashes, np.fromfile(path, "<i4", stop - start, offset=8 * (count + rows) + 4 * start)


class PartitionTask(NamedTuple):
    """Search one partition of the rows in ``splits`` with the tables whose first block is ``block``."""

    splits: tuple[str, ...]
    partition: int
    partition_bits: int
    block: int
    max_distance: int
    memory_bytes: int
    output: str


def search_partition(task: PartitionTask) -> Work:
    """Write ``task.output``: the partition's pairs (`PAIR`) in any order, then its `Work`.

    Raises:
        DataError: a damaged file, or more than ``memory_bytes`` of rows share one whole key.
    """
    if os.path.exists(task.output):
        return read_found(task.output)[1]

    def read() -> Iterator[Rows]:
        for path in task.splits:
            yield _read_split(path, task.partition, task.partition_bits)

    of = layout(task.max_distance)
    tables = [number for number, table in enumerate(of.tables) if table[0] == task.block]
    count = sum(len(rows) for _, rows in read())
    work = Work()
    with open_atomic(task.output) as file:
        search_rows(read, count, tables, of, 1, PairFile(file, task.max_distance), task.memory_bytes, work)
        finish_found(file, work)
    return work


class PairFile:
    """Where a search puts its pairs."""

    def __init__(self, file: BinaryIO, max_distance: int, hot_rows: int = HOT_ROWS):
        self._file, self.max_distance, self.hot_rows = file, max_distance, hot_rows

    def write(self, a: np.ndarray, b: np.ndarray, distance: np.ndarray | int) -> None:
        """Add pairs of rows, int32 [m] each, in either order."""
        pairs = np.empty(len(a), PAIR)
        pairs["low"], pairs["high"], pairs["distance"] = np.minimum(a, b), np.maximum(a, b), distance
        pairs.tofile(self._file)


def finish_found(file: BinaryIO, work: Work) -> None:
    """End a file of pairs with what finding them took."""
    np.array(dataclasses.astuple(work), "<f8").tofile(file)


def read_found(path: str | Path) -> tuple[np.ndarray, Work]:
    """Pairs (`PAIR`, mapped) and `Work` of a file that a search wrote."""
    fields = dataclasses.fields(Work)
    pair_bytes = os.path.getsize(path) - 8 * len(fields)
    if pair_bytes < 0 or pair_bytes % PAIR.itemsize:
        raise DataError(f"{path}: damaged file of pairs; remove it and start again")
    values = np.fromfile(path, "<f8", offset=pair_bytes).tolist()
    kinds = [type(field.default) for field in fields]
    work = Work(*(kind(value) for kind, value in zip(kinds, values, strict=True)))
    if not pair_bytes:
        return np.zeros(0, PAIR), work
    return np.memmap(path, PAIR, "r", shape=(pair_bytes // PAIR.itemsize,)), work


def search_rows(
    read: Read,
    count: int,
    tables: list[int],
    of: Layout,
    depth: int,
    output: PairFile,
    memory_bytes: int,
    work: Work,
) -> None:
    """Search ``count`` rows with some tables, in as many loads as the memory bound asks for.

    All rows that can share a key of these tables must be among those read, and the tables have their first ``depth``
    blocks in common. Rows that are too many for one load are taken by ranges of the next block's values.
    """
    if count * BYTES_PER_ROW <= memory_bytes:
        _search_load(read, count, tables, output, work)
        return
    if depth == KEY_BLOCKS:
        raise DataError(
            f"{count} rows agree in {of.key_bits(tables[0])} bits of their hash, too many for {memory_bytes} bytes of "
            f"memory; allow {count * BYTES_PER_ROW} bytes, or remove near-blank images first"
        )
    for block in sorted({of.tables[table][depth] for table in tables}):
        served = [table for table in tables if of.tables[table][depth] == block]
        for low, high, part in _ranges(read, of, block, memory_bytes // BYTES_PER_ROW):
            selected = _selected(read, of, block, low, high)
            search_rows(selected, part, served, of, depth + 1, output, memory_bytes, work)


def _ranges(read: Read, of: Layout, block: int, most_rows: int) -> list[tuple[int, int, int]]:
    """(low, high, rows): consecutive values of a block, as many at a time as ``most_rows`` allows, at least one."""
    counts = np.zeros(1 << of.blocks[block][1], np.int64)
    for hashes, _ in read():
        counts += np.bincount(of.block_values(hashes, block), minlength=len(counts))
    ranges, low, rows = [], 0, 0
    for value, more in enumerate(counts.tolist()):
        if rows and rows + more > most_rows:
            ranges.append((low, value, rows))
            low, rows = value, 0
        rows += more
    return [*ranges, (low, len(counts), rows)]


def _selected(read: Read, of: Layout, block: int, low: int, high: int) -> Read:
    def selected() -> Iterator[Rows]:
        for hashes, rows in read():
            values = of.block_values(hashes, block)
            inside = (values >= low) & (values < high)
            yield hashes[inside], rows[inside]

    return selected


def _search_load(read: Read, count: int, tables: list[int], output: PairFile, work: Work) -> None:
    """Search rows that fit into memory. Equal hashes count as one, their lowest row; the search that includes the
    first table sees every hash exactly once, and it reports the pairs of that row with the others."""
    clock = Clock()
    hashes, rows = _load(read, count)
    order = np.argsort(hashes)
    hashes, rows = hashes[order], rows[order]
    del order
    hashes, rows = _collapse(hashes, rows, output if 0 in tables else None)
    work.load_s += clock.lap_s()
    work.loaded_rows += count
    for a, b in near_pairs(hashes, output.max_distance, work, tables, hot_rows=output.hot_rows):
        distance = np.bitwise_count(a ^ b)
        a, b = rows[np.searchsorted(hashes, a)], rows[np.searchsorted(hashes, b)]
        output.write(a, b, distance)


def _load(read: Read, count: int) -> Rows:
    hashes, rows = np.empty(count, np.uint64), np.empty(count, np.int32)
    start = 0
    for some_hashes, some_rows in read():
        stop = start + len(some_rows)
        hashes[start:stop], rows[start:stop] = some_hashes, some_rows
        start = stop
    return hashes, rows


def _collapse(hashes: np.ndarray, rows: np.ndarray, output: PairFile | None) -> Rows:
    """The distinct of sorted hashes, each with its lowest row; the pairs of distance 0 go to ``output``."""
    new = np.ones(len(hashes), bool)
    new[1:] = hashes[1:] != hashes[:-1]
    if new.all():
        return hashes, rows
    starts = np.flatnonzero(new)
    lowest = np.minimum.reduceat(rows, starts)
    for start in range(0, len(rows) if output is not None else 0, _CHUNK_ROWS):
        others = rows[start : start + _CHUNK_ROWS]
        places = np.arange(start, start + len(others))
        first = lowest[np.searchsorted(starts, places, side="right") - 1]
        output.write(first[others != first], others[others != first], 0)
    return hashes[starts], lowest
