"""What every stage said about every part of the input, on disk.

    <work>/00-list/<part>/rows.parquet         items as the reader found them, and their position in the part
    <work>/01-inspect/<part>/rows.parquet      position and the columns that the stage adds, of the rows still alive
                            dropped.parquet    the rows that ended here, with reason and reference to the bytes
                            _SUCCESS.json      stage, version, input, result, counts; counts reconcile
    <work>/01-inspect/_SUCCESS.json            the sum over all parts, once they are all there

A part folder is written under another name and renamed when whole, so it is there in full or not at all. ``input`` and
``result`` are a chain of hashes over all stages so far: a part stands for itself only while the stage has the same
version and what came into it is the same. Columns are read from the last stage that wrote them: a stage writes only
what it adds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nucleus.data import index
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_json_atomic

ROWS, DROPPED, SUCCESS = "rows.parquet", "dropped.parquet", "_SUCCESS.json"
POSITION = pa.field("position", pa.int32())
DROPPED_SCHEMA = pa.schema([POSITION, pa.field("retry", pa.bool_()), *index.QUARANTINE_SCHEMA])


@dataclasses.dataclass(frozen=True)
class Level:
    """One stage of a recipe as the store sees it. number: its place, from 0. columns: those that it writes."""

    number: int
    name: str
    columns: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.number:02d}-{self.name}"


class Record(NamedTuple):
    """Content of a part's ``_SUCCESS.json``.

    counts: in, kept, rejected {reason: n}, quarantined {reason: n}. retry: quarantined rows worth another try.
    notes: {code: n} of harmless oddities.
    """

    stage: str
    version: str
    input: str
    result: str
    counts: dict[str, Any]
    retry: int
    notes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Store:
    """Reads and writes the tables under ``work``; small and picklable, so that workers get a copy."""

    work: str
    levels: tuple[Level, ...]

    def part_folder(self, level: int, part: str) -> Path:
        """Where a part of a stage lies."""
        return Path(self.work) / self.levels[level].folder / part

    def record(self, level: int, part: str) -> Record | None:
        """A finished part's record, None where there is none.

        Raises:
            DataError: the record is damaged.
        """
        path = self.part_folder(level, part) / SUCCESS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("checksum", None) != _checksum(values):
                raise ValueError("wrong checksum")
            return Record(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove {path.parent} and run again") from error

    def finished(self, level: int, part: str) -> Record:
        """The record of a part that must be there."""
        record = self.record(level, part)
        if record is None:
            raise AssertionError(f"{self.part_folder(level, part)} is not finished")
        return record

    def write(
        self,
        level: int,
        part: str,
        rows: pa.Table,
        dropped: pa.Table,
        *,
        version: str,
        entry: str,
        notes: dict[str, int] | None = None,
    ) -> Record:
        """Put a finished part in place; ``entry`` is the chain hash of what came into it.

        rows: position, then the columns of the level; dropped: `DROPPED_SCHEMA`; both sorted by position.
        """
        final = self.part_folder(level, part)
        temporary = final.with_name(f".{part}.tmp{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        index.write_table(rows, temporary / ROWS)
        index.write_table(dropped, temporary / DROPPED)
        digest = hashlib.sha256(entry.encode())
        for name in (ROWS, DROPPED):
            digest.update((temporary / name).read_bytes())
        counts = count_verdicts(len(rows), dropped)
        retry = int(np.count_nonzero(dropped["retry"].to_numpy(zero_copy_only=False)))
        record = Record(
            self.levels[level].name, version, entry, digest.hexdigest(), counts, retry, notes or {}
        )
        values = record._asdict()
        write_json_atomic(temporary / SUCCESS, {**values, "checksum": _checksum(values)})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        return record

    def forget(self, part: str) -> None:
        """Remove what all stages said about a part."""
        for number in range(len(self.levels)):
            shutil.rmtree(self.part_folder(number, part), ignore_errors=True)

    def positions(self, level: int, part: str) -> np.ndarray:
        """Positions [int32] of the rows still alive after a stage, ascending."""
        return self._table(level, part, ROWS, ["position"])["position"].to_numpy()

    def dropped(self, level: int, part: str) -> pa.Table:
        """The rows that ended in a stage (`DROPPED_SCHEMA`)."""
        return self._table(level, part, DROPPED, None)

    def read(
        self, level: int, part: str, columns: Sequence[str], positions: np.ndarray | None = None
    ) -> pa.Table:
        """``position`` and the named columns after stage ``level``.

        positions: of the rows wanted, ascending; by default of all that are still alive.
        """
        wanted = self.positions(level, part) if positions is None else np.asarray(positions, np.int32)
        owners: dict[int, list[str]] = {}
        for name in columns:
            owners.setdefault(self.owner(level, name), []).append(name)
        out: dict[str, pa.ChunkedArray | pa.Array] = {"position": pa.array(wanted, pa.int32())}
        for owner, names in owners.items():
            table = self._table(owner, part, ROWS, ["position", *names])
            at = np.searchsorted(table["position"].to_numpy(), wanted)
            taken = table if len(table) == len(wanted) else table.take(pa.array(at))
            out.update({name: taken[name] for name in names})
        return pa.table({name: out[name] for name in ("position", *columns)})

    def owner(self, level: int, column: str) -> int:
        """Number of the last stage up to ``level`` that writes ``column``."""
        for number in range(level, -1, -1):
            if column in self.levels[number].columns:
                return number
        raise KeyError(f"no stage up to {self.levels[level].name} writes column {column}")

    def _table(self, level: int, part: str, file: str, columns: list[str] | None) -> pa.Table:
        path = self.part_folder(level, part) / file
        try:
            return pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: damaged ({reason}); remove {path.parent} and run again") from error


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def count_verdicts(kept: int, dropped: pa.Table) -> dict[str, Any]:
    """Counts of one part, reasons sorted."""
    counts: dict[str, Any] = {"in": kept + len(dropped), "kept": kept, "rejected": {}, "quarantined": {}}
    pairs = zip(dropped["verdict"].to_pylist(), dropped["reason"].to_pylist(), strict=True)
    for verdict, reason in sorted(pairs):
        counts[verdict][reason] = counts[verdict].get(reason, 0) + 1
    return counts


def total(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum of counts of many parts; reasons sorted."""
    out: dict[str, Any] = {"in": 0, "kept": 0, "rejected": {}, "quarantined": {}}
    for one in counts:
        out["in"] += one["in"]
        out["kept"] += one["kept"]
        for verdict in ("rejected", "quarantined"):
            out[verdict] = add_counts(out[verdict], one[verdict])
    return out


def add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Sum of two tables of counts, sorted by name."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted(a.keys() | b.keys())}


def check_reconciled(label: str, counts: dict[str, Any], arrived: int) -> None:
    """in = kept + rejected + quarantined, and in = what arrived.

    Raises:
        AssertionError: they do not reconcile; a bug in the stage.
    """
    out = sum(counts["rejected"].values()) + sum(counts["quarantined"].values())
    if counts["in"] != counts["kept"] + out or counts["in"] != arrived:
        raise AssertionError(f"{label}: counts do not reconcile, {arrived} rows arrived: {counts}")


class Corpus:
    """All rows that reach a corpus stage, part by part. What is held in memory is up to the stage.

    Attributes:
        parts: names, in order. rows: how many rows are alive in each, in the same order.
        work: folder for the stage's own files; removed once the stage is done, kept when it is interrupted.
        source: reads a row's bytes, from its reference columns.
        map: ``map(function, tasks)`` runs a module-level function over picklable tasks in the engine's workers and
            yields the results in order. A task that ends its process, also when it is run alone, is a DataError; with
            ``lost_too=True`` its result is an `engines.WorkerDied`, unless there are more than a few.
    """

    def __init__(
        self,
        store: Store,
        level: int,
        parts: Sequence[str],
        work: Path,
        source: Any,
        map: Callable[..., Iterator[Any]],
    ):
        """level: of the stage before, whose rows are read."""
        self._store, self._level = store, level
        self.parts, self.work, self.source, self.map = tuple(parts), work, source, map
        self.rows = tuple(store.finished(level, part).counts["kept"] for part in self.parts)

    def read(self, part: str, columns: Sequence[str], positions: np.ndarray | None = None) -> pa.Table:
        """``position`` (int32, ascending) and the columns of a part's rows; ``positions`` chooses some of them."""
        return self._store.read(self._level, part, columns, positions)

    def gather(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The columns of chosen rows. rows: numbers as `starts` counts them, ascending, int64.

        Memory is that of the result.
        """
        starts = self.starts()
        pieces = []
        first = np.searchsorted(rows, starts)
        for number, part in enumerate(self.parts):
            chosen = rows[first[number] : first[number + 1]] - starts[number]
            if len(chosen):
                alive = self._store.positions(self._level, part)
                pieces.append(self.read(part, columns, alive[chosen]).select(list(columns)))
        if not pieces:
            return self.read(self.parts[0], columns, np.empty(0, np.int32)).select(list(columns))
        return pa.concat_tables(pieces).combine_chunks()

    def starts(self) -> np.ndarray:
        """Number of the first row of each part when all rows are counted through, and the total [int64, parts + 1]."""
        return np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)]).astype(np.int64)
