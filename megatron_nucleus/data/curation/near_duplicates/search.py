"""All pairs of a corpus whose hashes differ in a few bits, in bounded memory.

Where the rows fit into the bound, one load is searched in this process. Otherwise partition files are written, for one
first block after the other: 12 bytes per row of temporary space, 60 in all but never at once. The result is the same,
byte for byte, whatever the bound, the number of processes, or the number of times that the work was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_nucleus.data.curation.near_duplicates.keys import LARGEST_DISTANCE, layout
from megatron_nucleus.data.curation.near_duplicates.pairs import Work
from megatron_nucleus.data.curation.near_duplicates.partitions import (
    BYTES_PER_ROW,
    PAIR,
    SPLIT_BYTES_PER_ROW,
    PairFile,
    PartitionTask,
    Rows,
    SplitTask,
    finish_found,
    read_found,
    search_partition,
    search_rows,
    split_rows,
)
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import open_atomic, write_json_atomic

MAX_ROWS = 2**31 - 1  # row numbers are int32
MOST_PARTITION_BITS = 12  # 4,096 partitions: enough for 2^31 rows, and few enough files
_MERGE_BYTES_PER_PAIR = 48  # a pair, its sort key, its place, and a sorted copy
_READ_ROWS = 1 << 20

MapTasks = Callable[[Callable[[Any], Work], list], Iterable[Work]]


def one_by_one(function: Callable[[Any], Work], tasks: list) -> Iterable[Work]:
    """Run tasks in this process. Any other way will do that runs each once and yields results in any order."""
    return map(function, tasks)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How near hashes are, and what finding them may take."""

    max_distance: int = knob(4, "hashes that differ in so many bits or fewer are near", unit="bits")
    memory_bytes: int = knob(1 << 30, "working memory of a search task; bounds nothing else", unit="bytes")

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= LARGEST_DISTANCE:
            raise ConfigError(f"max_distance {self.max_distance}: must be 0 to {LARGEST_DISTANCE} bits")
        if self.memory_bytes < 1 << 20:
            raise ConfigError(f"memory_bytes {self.memory_bytes}: must be at least {1 << 20} (1 MiB)")


class Found(NamedTuple):
    """What a search found.

    pairs: `PAIR` [m], mapped from ``path``, sorted by low, then high, each pair once. Rows with equal hashes appear
    as pairs of distance 0 with the lowest of them, and that row alone is paired with other hashes.
    work: totals of the tasks, including those of an earlier call that was interrupted (of its splits only the rest).
    """

    pairs: np.ndarray
    path: Path
    work: Work


def search(
    hashes: np.ndarray | str | Path,
    folder: str | Path,
    config: SearchConfig | None = None,
    map_tasks: MapTasks = one_by_one,
) -> Found:
    """Find all pairs within ``config.max_distance``; the same call goes on after an interruption.

    Args:
        hashes: uint64 [n], n < 2^31, an array of any kind or the path of a ``.npy`` file (an array that does not fit
            into the memory bound is first copied into the folder, so that other processes can read it).
        folder: of this search alone, on a disk that all processes see.
        map_tasks: called as ``map_tasks(function, tasks)``; function and tasks can be pickled.

    Raises:
        ConfigError: not such an array, or the folder belongs to a search of other hashes.
        DataError: a work file is damaged, or more rows share a key than the memory bound allows.
    """
    config = SearchConfig() if config is None else config
    values = _open(hashes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _make_plan(folder, values, config)
    path = folder / "pairs.npy"
    if not path.exists():
        if not plan.partition_bits:
            found = [_search_in_memory(values, folder, config)]
        else:
            given = isinstance(hashes, (str, Path))
            source = Path(hashes).resolve() if given else _save_once(values, folder / "hashes.part")
            found = _search_partitions(str(source), folder, plan, config, map_tasks)
        total = Work()
        for file in found:
            total.add(read_found(file)[1])
        write_json_atomic(folder / "work.json", dataclasses.asdict(total))
        _merge(found, path, plan.rows, config.memory_bytes)
    for leftover in (*folder.glob("*.part"), *folder.glob(".*.tmp*")):
        leftover.unlink(missing_ok=True)
    return Found(open_pairs(path), path, Work(**json.loads((folder / "work.json").read_text())))


def open_pairs(path: str | Path) -> np.ndarray:
    """Map the pairs of an earlier search: `PAIR` [m]."""
    few = Path(path).stat().st_size < 4096  # none at all cannot be mapped
    pairs = np.load(path, mmap_mode=None if few else "r")
    if pairs.dtype != PAIR:
        raise DataError(f"{path}: not a file of pairs")
    return pairs


def _open(hashes: np.ndarray | str | Path) -> np.ndarray:
    name = "hashes"
    if isinstance(hashes, (str, Path)):
        name = str(hashes)
        try:
            hashes = np.load(hashes, mmap_mode="r")
        except FileNotFoundError as error:
            raise ConfigError(f"{name}: no such file") from error
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{name}: cannot be read as .npy ({error}); write it again") from error
    if hashes.ndim != 1 or hashes.dtype != np.uint64:
        raise ConfigError(f"{name}: {hashes.dtype} {list(hashes.shape)}; must be uint64 [rows]")
    if len(hashes) > MAX_ROWS:
        raise ConfigError(f"{name}: {len(hashes)} rows; at most {MAX_ROWS} can be searched at once")
    return hashes


def _save_once(values: np.ndarray, path: Path) -> Path:
    if not path.exists():
        with open_atomic(path) as file:
            np.save(file, values)
    return path


class _Plan(NamedTuple):
    """What a folder is for, and how its files are cut; an interrupted search keeps its cut."""

    rows: int
    sha256: str
    max_distance: int
    split_rows: int
    partition_bits: int


def _make_plan(folder: Path, values: np.ndarray, config: SearchConfig) -> _Plan:
    digest = hashlib.sha256()
    for start in range(0, len(values), _READ_ROWS):
        digest.update(np.ascontiguousarray(values[start : start + _READ_ROWS]))
    rows = len(values)
    block_bits = min(width for _, width in layout(config.max_distance).blocks)
    # Half full on average, so that most partitions fit although hashes are not spread evenly (own choice).
    wanted = -(-2 * rows * BYTES_PER_ROW // config.memory_bytes)
    bits = 0 if rows * BYTES_PER_ROW <= config.memory_bytes else (wanted - 1).bit_length()
    bits = min(bits, block_bits, MOST_PARTITION_BITS)
    split = max(1, config.memory_bytes // SPLIT_BYTES_PER_ROW)
    plan = _Plan(rows, digest.hexdigest(), config.max_distance, split, bits)
    path = folder / "plan.json"
    if not path.exists():
        write_json_atomic(path, plan._asdict())
        return plan
    try:
        before = _Plan(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {folder}") from error
    if before[:3] != plan[:3]:
        raise ConfigError(
            f"{folder}: holds the search of {before.rows} other hashes or of another distance; remove it or name "
            "another folder"
        )
    return before


def _search_in_memory(values: np.ndarray, folder: Path, config: SearchConfig) -> Path:
    of = layout(config.max_distance)
    path = folder / "found.part"

    def read() -> Iterator[Rows]:
        for start in range(0, len(values), _READ_ROWS):
            part = values[start : start + _READ_ROWS]
            yield part, np.arange(start, start + len(part), dtype=np.int32)

    work = Work()
    tables = list(range(len(of.tables)))
    with open_atomic(path) as file:
        output = PairFile(file, config.max_distance)
        search_rows(read, len(values), tables, of, 0, output, config.memory_bytes, work)
        finish_found(file, work)
    return path


def _search_partitions(
    source: str, folder: Path, plan: _Plan, config: SearchConfig, map_tasks: MapTasks
) -> list[Path]:
    """Split and search for one first block after the other, so that the space for one suffices."""
    found = []
    for block in range(plan.max_distance + 1):
        outputs = [folder / f"found-{block}-{n:04d}.part" for n in range(1 << plan.partition_bits)]
        found += outputs
        starts = range(0, plan.rows, plan.split_rows)
        splits = [str(folder / f"split-{block}-{n:05d}.part") for n in range(len(starts))]
        split_work = folder / f"split-{block}.part"
        if not all(path.exists() for path in outputs):
            tasks = [
                SplitTask(
                    source, start, min(start + plan.split_rows, plan.rows), block, plan.partition_bits,
                    plan.max_distance, path,
                )
                for start, path in zip(starts, splits, strict=True)
            ]  # fmt: skip
            total = Work()
            for work in map_tasks(split_rows, tasks):
                total.add(work)
            if not split_work.exists():
                with open_atomic(split_work) as file:
                    finish_found(file, total)
            searches = [
                PartitionTask(
                    tuple(splits), n, plan.partition_bits, block, plan.max_distance, config.memory_bytes, str(path)
                )
                for n, path in enumerate(outputs)
            ]  # fmt: skip
            for _ in map_tasks(search_partition, searches):
                pass
        found.append(split_work)
        for path in splits:
            Path(path).unlink(missing_ok=True)
    return found


def _merge(found: list[Path], path: Path, rows: int, memory_bytes: int) -> None:
    """Sort the pairs of all files by low, then high, a range of low rows at a time, into ``path``."""
    files = [read_found(file)[0] for file in found]
    total = sum(map(len, files))
    step = max(1, memory_bytes // _MERGE_BYTES_PER_PAIR)
    header = {"descr": np.lib.format.dtype_to_descr(PAIR), "fortran_order": False, "shape": (total,)}
    with open_atomic(path) as output:
        np.lib.format.write_array_header_1_0(output, header)
        for low, high in _low_ranges(files, rows, step):
            parts = [chunk[(chunk["low"] >= low) & (chunk["low"] < high)] for chunk in _chunks(files, step)]
            pairs = np.concatenate(parts) if parts else np.zeros(0, PAIR)
            place = np.argsort(pairs["low"].astype(np.int64) << 32 | pairs["high"])
            pairs[place].tofile(output)


def _chunks(files: list[np.ndarray], step: int) -> Iterator[np.ndarray]:
    for pairs in files:
        for start in range(0, len(pairs), step):
            yield pairs[start : start + step]


def _low_ranges(files: list[np.ndarray], rows: int, step: int) -> list[tuple[int, int]]:
    """Ranges of low rows with about ``step`` pairs each."""
    shift = max(0, rows.bit_length() - 16)
    counts = np.zeros((rows >> shift) + 1, np.int64)
    for chunk in _chunks(files, step):
        counts += np.bincount(chunk["low"] >> shift, minlength=len(counts))
    ranges, low, pairs = [], 0, 0
    for value, more in enumerate(counts.tolist()):
        if pairs and pairs + more > step:
            ranges.append((low << shift, value << shift))
            low, pairs = value, 0
        pairs += more
    return [*ranges, (low << shift, len(counts) << shift)]
