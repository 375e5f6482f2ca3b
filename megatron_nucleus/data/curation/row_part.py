"""A row stage on one part of the input: what a worker does.

The batch on which a stage raises is tried again row by row; the row on which it raises again is quarantined. In careful
mode every row leaves a trail before it is handled, so that one that takes the whole process down is known.
"""

from __future__ import annotations

import numbers
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS, Drop, PayloadSource, Row, Stage
from megatron_nucleus.data.curation.store import DROPPED_SCHEMA, Record, Store
from megatron_nucleus.data.images import UnusableImage, quiet_decoding
from megatron_nucleus.utils.errors import ConfigError, UserError
from megatron_nucleus.utils.staging import FULL_DISK

CRASHED = "process_crash"
# Column of the quarantine: that of a row, and field of a `Drop`.
_DESCRIBING = {"width_px": "width_px", "height_px": "height_px", "sha256": "id"}


class RowTask(NamedTuple):
    """A row stage on one part. entry: chain hash of what comes in.

    retry: run only the rows that were dropped for a passing reason. careful: row by row, because the process died on
    this part before. skip: positions of rows that take the process down.
    """

    store: Store
    level: int
    part: str
    line: Line
    version: str
    entry: str
    source: PayloadSource
    retry: bool = False
    careful: bool = False
    skip: frozenset[int] = frozenset()


def run_part(task: RowTask) -> Record:
    """Run a row stage on one part and put its tables in place; called in a worker."""
    stage, settings = task.line.load()
    store, before = task.store, task.level - 1
    old = _previous(task) if task.retry else None
    positions = old.again if old else store.positions(before, task.part)
    table = read_rows(store, before, task.part, stage, positions)
    trail_path = trail_of(store, task.level, task.part)
    trail = os.open(trail_path, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        with quiet_decoding():
            results = list(_results(stage, settings, table, task, trail))
    finally:
        os.close(trail)
    rows, dropped = _tables_of(stage, task, table, results)
    if old:
        rows = _join(old.rows, rows)
        dropped = _join(old.dropped, dropped)
    arrived = store.finished(before, task.part)
    label = f"stage {task.line.name}, {task.part}"
    tables.check_reconciled(label, tables.count_verdicts(len(rows), dropped), arrived.counts["kept"])
    record = store.write(
        task.level, task.part, rows, dropped, version=task.version, entry=task.entry, notes=_notes(rows)
    )
    trail_path.unlink(missing_ok=True)
    return record


def trail_of(store: Store, level: int, part: str) -> Path:
    """File with the position of the row in work: what is left of a process that died."""
    return store.part_folder(level, part).with_name(f".{part}.row")


def _join(old: pa.Table, new: pa.Table) -> pa.Table:
    """Both in the order of position; in one piece, so that equal rows give equal files."""
    return pa.concat_tables([old.cast(new.schema), new]).sort_by("position").combine_chunks()


class _Previous(NamedTuple):
    """What an earlier run made of a part. again: positions of the rows to run again; dropped: without those."""

    rows: pa.Table
    dropped: pa.Table
    again: np.ndarray


def _previous(task: RowTask) -> _Previous:
    dropped = task.store.dropped(task.level, task.part)
    retry = dropped["retry"].to_numpy(zero_copy_only=False).astype(bool)
    level = task.store.levels[task.level]
    rows = task.store.read(task.level, task.part, level.columns)
    return _Previous(rows, dropped.filter(pa.array(~retry)), dropped["position"].to_numpy()[retry])


def read_rows(store: Store, level: int, part: str, stage: Stage, positions: np.ndarray) -> pa.Table:
    known = {name for one in store.levels[: level + 1] for name in one.columns}
    describing = [name for name in _DESCRIBING.values() if name in known]
    columns = dict.fromkeys((*REFERENCE_COLUMNS, *stage.reads, *describing))
    return store.read(level, part, list(columns), positions)


def _results(
    stage: Stage, settings: Any, table: pa.Table, task: RowTask, trail: int
) -> Iterator[Mapping[str, Any] | Drop]:
    """One result per row of the table, in order."""
    size = 1 if task.careful else stage.batch_rows
    for start in range(0, len(table), size):
        batch = table.slice(start, size).to_pylist()
        if task.careful:
            position = batch[0]["position"]
            if position in task.skip:
                yield Drop(CRASHED, "handling it ended the whole process")
                continue
            os.pwrite(trail, position.to_bytes(8, "little"), 0)
        rows = [Row(values, task.source) for values in batch]
        yield from _call(stage, settings, rows)


def _call(stage: Stage, settings: Any, rows: Sequence[Row]) -> list[Mapping[str, Any] | Drop]:
    try:
        results = stage.function(rows, settings)
    except UserError:
        raise  # a wrong setting, or surroundings that would fail every row
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        if len(rows) == 1:
            return [_failed(stage, error)]
        return [result for row in rows for result in _call(stage, settings, [row])]
    return _checked(stage, results, len(rows))


def _failed(stage: Stage, error: BaseException) -> Drop:
    if isinstance(error, UnusableImage):
        return Drop(error.reason, error.detail)
    return Drop(f"{stage.name}_failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def _checked(stage: Stage, results: Any, rows: int) -> list[Mapping[str, Any] | Drop]:
    """What a stage returned, if it is what it promised.

    Raises:
        ConfigError: it is not; names the stage and what is wrong.
    """
    if not isinstance(results, list | tuple) or len(results) != rows:
        shown = (
            f"{len(results)} results" if isinstance(results, list | tuple) else f"a {type(results).__name__}"
        )
        raise ConfigError(
            f"stage {stage.name} returned {shown} for {rows} rows; it must be a list with one per row"
        )
    for number, result in enumerate(results):
        if isinstance(result, Drop):
            _check_drop(stage, number, result)
        elif not isinstance(result, Mapping):
            kind = type(result).__name__
            raise ConfigError(
                f"stage {stage.name}: result {number} is a {kind}; it must be a mapping or a Drop"
            )
        elif set(result) != set(stage.adds.names):
            raise ConfigError(
                f"stage {stage.name} returned the columns {sorted(map(str, result))}, it declares "
                f"{sorted(stage.adds.names)}"
            )
    return list(results)


def _check_drop(stage: Stage, number: int, drop: Drop) -> None:
    texts, sizes = (drop.reason, drop.detail), (drop.width_px, drop.height_px)
    if not (all(isinstance(text, str) for text in texts) and isinstance(drop.id, str | None)):
        raise ConfigError(
            f"stage {stage.name}: result {number} is {drop!r:.100}; reason and detail are text, id too or None"
        )
    if not all(size is None or (isinstance(size, numbers.Integral) and 0 < size < 2**31) for size in sizes):
        raise ConfigError(
            f"stage {stage.name}: result {number} is {drop!r:.100}; width_px and height_px are whole numbers above 0, "
            "or None"
        )
    if not stage.declares(drop.reason):
        raise ConfigError(
            f"stage {stage.name} drops a row for {drop.reason!r}, a reason that it does not declare"
        )


def _tables_of(
    stage: Stage, task: RowTask, table: pa.Table, results: Sequence[Mapping[str, Any] | Drop]
) -> tuple[pa.Table, pa.Table]:
    """Rows that go on, with the stage's columns, and dropped rows."""
    kept = [(at, result) for at, result in enumerate(results) if not isinstance(result, Drop)]
    columns = {"position": table["position"].take(pa.array([at for at, _ in kept], pa.int64()))}
    for field in stage.adds:
        columns[field.name] = _column(stage, field, [result[field.name] for _, result in kept])
    rows = pa.table(columns, schema=pa.schema([tables.POSITION, *stage.adds]))
    drops = [(at, result) for at, result in enumerate(results) if isinstance(result, Drop)]
    return rows, dropped_table(stage, task.line.name, table, drops)


def _column(stage: Stage, field: pa.Field, values: list[Any]) -> pa.Array:
    if pa.types.is_integer(field.type):  # pyarrow would cut the decimals of 1.5 without a word
        wrong = [value for value in values if not isinstance(value, numbers.Integral | None)]
        if wrong:
            raise ConfigError(f"stage {stage.name}: column {field.name}: {wrong[0]!r:.50} is no whole number")
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"stage {stage.name}: column {field.name} ({field.type}): {reason}") from error


def dropped_table(stage: Stage, label: str, table: pa.Table, drops: Sequence[tuple[int, Drop]]) -> pa.Table:
    """`DROPPED_SCHEMA` rows. table: position, reference and describing columns; drops: (row of it, verdict)."""
    values = table.take(pa.array([at for at, _ in drops], pa.int64())).to_pylist()
    rows = [
        {
            "position": row["position"],
            "retry": drop.reason in stage.failures
            or drop.reason == CRASHED,  # it may have been short of memory
            "item": row["item"],
            "verdict": "quarantined" if drop.reason == CRASHED else stage.verdict(drop.reason),
            "reason": drop.reason,
            "detail": drop.detail.encode("utf-8", "backslashreplace").decode(),
            "stage": label,
            "container": row["container"],
            "offset": row["offset"],
            "length": row["length"],
            **{name: _described(row, drop, source) for name, source in _DESCRIBING.items()},
        }
        for row, (_, drop) in zip(values, drops, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA)


def _described(row: Mapping[str, Any], drop: Drop, name: str) -> Any:
    """What the stage found out, else what was known before."""
    found = getattr(drop, name)
    return row.get(name) if found is None else found


def _notes(rows: pa.Table) -> dict[str, int]:
    if "notes" not in rows.column_names:
        return {}
    return dict(sorted(Counter(code for notes in rows["notes"].to_pylist() for code in notes).items()))
