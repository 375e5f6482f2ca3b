"""Runs a corpus stage: one call that sees all rows, and one `Update` per part.

What the stage says is checked as a row stage's results are: reasons that it declares, columns that it declares, and
positions of rows that reached it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines import Engine, WorkerDied
from megatron_nucleus.data.curation.recipe import Line, load_stage
from megatron_nucleus.data.curation.row_part import CRASHED, dropped_table, read_rows
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA, Drop, Stage, Update
from megatron_nucleus.data.curation.store import Corpus, Record, Store
from megatron_nucleus.utils.errors import ConfigError, DataError, UserError
from megatron_nucleus.utils.files import write_atomic
from megatron_nucleus.utils.staging import FULL_DISK

if TYPE_CHECKING:
    from megatron_nucleus.data.curation.runner import Run

_MAX_KILLERS = 20  # own choice, as many as a part of a row stage may have: more is a machine short of memory
_END = object()


def run_corpus(
    run: Run, level: int, line: Line, version: str, folder: Path, progress: Callable[[Record], Any]
) -> list[Record]:
    before = [run.store.finished(level - 1, part) for part in run.parts]
    entry = hashlib.sha256("".join(record.result for record in before).encode()).hexdigest()
    found = [run.store.record(level, part) for part in run.parts]
    # What failed for a passing reason may change what the others are copies of: then all of it runs again.
    again = run.retry and any(r is not None and r.retry for r in found)
    if again:
        # All of them before the first is written: none of two attempts may stand side by side.
        for part in run.parts:
            shutil.rmtree(run.store.part_folder(level, part))
    if again or any(r is None or r.version != version or r.input != entry for r in found):
        found = _run_corpus_stage(run, level, line, version, entry, _stage_work(folder, version + entry))
    records = [record for record in found if record is not None]
    for record in records:
        progress(record)
    return records


def _stage_work(folder: Path, stamp: str) -> Path:
    """The stage's own folder; what an interrupted run left there is kept only for the same version and input."""
    work = folder / ".work"
    mark = work / "stamp"
    if work.is_dir() and not (mark.is_file() and mark.read_text() == stamp):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    write_atomic(mark, stamp)
    return work


def _run_corpus_stage(
    run: Run, level: int, line: Line, version: str, entry: str, work: Path
) -> list[Record | None]:
    stage, settings = line.load()
    corpus = Corpus(
        run.store, level - 1, run.parts, work, run.source, _in_order(run.engine, line.name, line.spec)
    )
    records: list[Record | None] = []
    updates = _one_each(line.name, len(run.parts), _updates(line, stage, corpus, settings))
    for part, alive, update in zip(run.parts, corpus.rows, updates, strict=True):
        label = f"stage {line.name}, {part}"
        checked = _checked(label, stage, update, run.store.positions(level - 1, part))
        rows, dropped = _apply(run.store, level, part, stage, line.name, checked)
        tables.check_reconciled(label, tables.count_verdicts(len(rows), dropped), alive)
        records.append(run.store.write(level, part, rows, dropped, version=version, entry=entry))
    return records


def _one_each(name: str, parts: int, updates: Iterator[Update]) -> Iterator[Update]:
    """The updates; the last one only when the stage has ended after it, so that nothing of a wrong one is finished.

    Raises:
        ConfigError: not one per part.
    """
    for number in range(parts):
        update = next(updates, _END)
        if update is _END:
            raise ConfigError(
                f"stage {name} yielded {number} updates for {parts} parts; it must be one per part"
            )
        if number == parts - 1 and next(updates, _END) is not _END:
            raise ConfigError(f"stage {name} yielded more than one update per part ({parts} parts)")
        yield update


def _updates(line: Line, stage: Stage, corpus: Corpus, settings: Any) -> Iterator[Update]:
    """What the stage yields; what a stage of the user's own raises becomes an error that names it and the place.

    Raises:
        ConfigError: the stage raised, or is no generator. One of this package is a bug then, and keeps its traceback.
    """
    try:
        yielded = stage.function(corpus, settings)
        if not isinstance(yielded, Iterable):
            raise TypeError(f"it returned a {type(yielded).__name__}; it must yield one Update per part")
        yield from yielded
    except UserError:
        raise  # a wrong setting, or damaged data
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        error.add_note(f"in stage {line.name}")
        if stage.function.__module__.startswith("megatron_nucleus."):
            raise
        what = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"stage {line.name}: {type(error).__name__}: {what}{_place(error, stage)}"
        ) from error


def _place(error: BaseException, stage: Stage) -> str:
    """Where in the stage's own file it raised, as `` (FILE.py:LINE)``."""
    file = getattr(sys.modules[stage.function.__module__], "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == file]
    return f" ({Path(str(file)).name}:{own[-1]})" if own else ""


def _checked(label: str, stage: Stage, update: Any, alive: np.ndarray) -> Update:
    """The update with the types of its schemas, if it is what the stage promised. alive: positions, int32 ascending.

    Raises:
        ConfigError: it is not; begins with ``label``.
    """
    if not (isinstance(update, Update) and all(isinstance(table, pa.Table) for table in update)):
        raise ConfigError(
            f"{label}: it yielded a {type(update).__name__}; it must be an Update of two tables"
        )
    drops = _typed(f"{label}: drops", update.drops, DROPS_SCHEMA)
    changes = _typed(f"{label}: changes", update.changes, pa.schema([tables.POSITION, *stage.adds]))
    for name in DROPS_SCHEMA.names:
        if drops[name].null_count:
            raise ConfigError(f"{label}: drops: {drops[name].null_count} rows without {name}")
    for name, table in (("drops", drops), ("changes", changes)):
        _check_positions(f"{label}: {name}", table["position"], alive)
    for reason in drops["reason"].unique().to_pylist():
        if not (stage.declares(reason) or reason == CRASHED):
            raise ConfigError(f"{label}: drops rows for {reason!r}, a reason that it does not declare")
    return Update(drops, changes)


def _typed(label: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    if sorted(table.column_names) != sorted(schema.names):
        raise ConfigError(
            f"{label}: has the columns {sorted(table.column_names)}, not {sorted(schema.names)}"
        )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{label}: {str(error).splitlines()[0]}") from error


def _check_positions(label: str, column: pa.ChunkedArray, alive: np.ndarray) -> None:
    """Positions of rows that are alive, ascending, each once."""
    if column.null_count:
        raise ConfigError(f"{label}: {column.null_count} rows without position")
    positions = column.to_numpy()
    if len(strange := positions[~np.isin(positions, alive)]):
        raise ConfigError(f"{label}: position {strange[0]} is not that of a row which reached the stage")
    if len(falling := np.flatnonzero(np.diff(positions) <= 0)):
        first, second = positions[falling[0]], positions[falling[0] + 1]
        raise ConfigError(
            f"{label}: position {second} comes after {first}; they must ascend, each of them once"
        )


def _in_order(engine: Engine, name: str, spec: str) -> Callable[..., Iterator[Any]]:
    """`Corpus.map` over an engine.

    A process that ends takes others in flight with it, so every lost task is run again, alone.
    """

    def map_in_order(
        function: Callable[[Any], Any], tasks: Sequence[Any], lost_too: bool = False
    ) -> Iterator[Any]:
        calls = [_Call(spec, number, function, task) for number, task in enumerate(tasks)]
        waiting: dict[int, Any] = {}
        lost = []
        wanted = 0
        for call, result in engine.map(_run_call, calls):
            if isinstance(result, WorkerDied):
                lost.append(call)
                continue
            waiting[call.number] = result
            while wanted in waiting:
                yield waiting.pop(wanted)
                wanted += 1
        killers = 0
        for call in sorted(lost, key=lambda call: call.number):
            result = engine.alone(_run_call, call)
            killers += isinstance(result, WorkerDied)
            if isinstance(result, WorkerDied) and (not lost_too or killers > _MAX_KILLERS):
                raise DataError(
                    f"stage {name}: {killers} of its {len(calls)} tasks ended their process, also when run alone "
                    f"({result.detail}); is there enough memory?"
                )
            waiting[call.number] = result
        yield from (waiting[number] for number in range(wanted, len(calls)))

    return map_in_order


class _Call:
    """A task of a stage, with its number and its function.

    A worker gets both as bytes and loads the stage before it looks into them: a function or a class of the user's own
    file is found only once that file is imported.
    """

    def __init__(self, spec: str, number: int, function: Callable[[Any], Any], task: Any):
        self.spec, self.number, self.function, self.task = spec, number, function, task

    def __reduce__(self) -> tuple:
        return _unpack_call, (self.spec, self.number, pickle.dumps((self.function, self.task)))


def _unpack_call(spec: str, number: int, packed: bytes) -> _Call:
    load_stage(spec)
    return _Call(spec, number, *pickle.loads(packed))


def _run_call(call: _Call) -> Any:
    return call.function(call.task)


def _apply(
    store: Store, level: int, part: str, stage: Stage, label: str, update: Update
) -> tuple[pa.Table, pa.Table]:
    drops = update.drops
    gone = drops["position"].to_numpy()
    alive = store.positions(level - 1, part)
    kept = alive[~np.isin(alive, gone)]
    described = read_rows(store, level - 1, part, dataclasses.replace(stage, reads=()), gone)
    pairs = [
        (at, Drop(reason, detail))
        for at, (reason, detail) in enumerate(
            zip(drops["reason"].to_pylist(), drops["detail"].to_pylist(), strict=True)
        )
    ]
    dropped = dropped_table(stage, label, described, pairs)
    return _changed(store, level, part, stage, kept, update.changes), dropped


def _changed(
    store: Store, level: int, part: str, stage: Stage, kept: np.ndarray, changes: pa.Table
) -> pa.Table:
    """The stage's columns for the rows that go on: what it changed, and else what they were."""
    known = {name for one in store.levels[:level] for name in one.columns}
    old = store.read(level - 1, part, [n for n in stage.adds.names if n in known], kept)
    listed = changes["position"].to_numpy()
    at = np.searchsorted(listed, kept)
    hit = (
        (at < len(listed)) & (listed[np.minimum(at, max(len(listed) - 1, 0))] == kept)
        if len(listed)
        else (np.zeros(len(kept), bool))
    )
    out: dict[str, Any] = {"position": pa.array(kept, pa.int32())}
    for field in stage.adds:
        before = old[field.name] if field.name in old.column_names else pa.nulls(len(kept), field.type)
        both = pa.chunked_array([*_chunks(before, field.type), *_chunks(changes[field.name], field.type)])
        source = np.where(hit, len(kept) + at, np.arange(len(kept)))
        out[field.name] = both.take(pa.array(source, pa.int64()))
    return pa.table(out, schema=pa.schema([tables.POSITION, *stage.adds]))


def _chunks(values: Any, kind: pa.DataType) -> list[pa.Array]:
    cast = values.cast(kind)
    return cast.chunks if isinstance(cast, pa.ChunkedArray) else [cast]
