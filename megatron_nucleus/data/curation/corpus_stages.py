"""Runs a corpus stage: one call that sees all rows, and one `Update` per part."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines import Engine, WorkerDied
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.row_part import dropped_table, read_rows
from megatron_nucleus.data.curation.stage import DROPS_SCHEMA, Drop, Stage, Update
from megatron_nucleus.data.curation.store import Corpus, Record, Store
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic

if TYPE_CHECKING:
    from megatron_nucleus.data.curation.runner import Run


def run_corpus(
    run: Run, level: int, line: Line, version: str, folder: Path, progress: Callable[[Record], Any]
) -> list[Record]:
    before = [run.store.finished(level - 1, part) for part in run.parts]
    entry = hashlib.sha256("".join(record.result for record in before).encode()).hexdigest()
    found = [run.store.record(level, part) for part in run.parts]
    if any(r is None or r.version != version or r.input != entry for r in found):
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
    corpus = Corpus(run.store, level - 1, run.parts, work, run.source, _in_order(run.engine, line.name))
    records: list[Record | None] = []
    for part, alive, update in zip(run.parts, corpus.rows, stage.function(corpus, settings), strict=True):
        rows, dropped = _apply(run.store, level, part, stage, line.name, update)
        label = f"stage {line.name}, {part}"
        tables.check_reconciled(label, tables.count_verdicts(len(rows), dropped), alive)
        records.append(run.store.write(level, part, rows, dropped, version=version, entry=entry))
    return records


def _in_order(engine: Engine, name: str) -> Callable[..., Iterator[Any]]:
    def map_in_order(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        numbered = list(enumerate(tasks))
        waiting: dict[int, Any] = {}
        wanted = 0
        for (number, _), result in engine.map(_Numbered(function), numbered):
            if isinstance(result, WorkerDied):
                raise DataError(
                    f"stage {name}: a worker was lost ({result.detail}); run the same command again"
                )
            waiting[number] = result
            while wanted in waiting:
                yield waiting.pop(wanted)
                wanted += 1

    return map_in_order


class _Numbered:
    """Calls a function on the second of a pair."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, pair: tuple[int, Any]) -> Any:
        return self.function(pair[1])


def _apply(
    store: Store, level: int, part: str, stage: Stage, label: str, update: Update
) -> tuple[pa.Table, pa.Table]:
    drops = update.drops.cast(DROPS_SCHEMA)
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
