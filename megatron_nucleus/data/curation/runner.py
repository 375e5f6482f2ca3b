"""Runs one stage of curation over the parts of the input: each part once, whatever happens in between.

- A part that is there with the stage's version and the same input is not run again; after a crash only unfinished
  parts are. Equal input gives equal files, on any engine with any number of workers.
- A stage that raises costs the row on which it raises: the batch is tried again row by row. A row that takes the
  whole process down (a decoder does, now and then) is found by the trail that the worker leaves, and quarantined.
- ``retry``: rows that were quarantined for a passing reason are run again, those rows alone.
- The counts of every part reconcile, or the runner stops.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.corpus_stages import run_corpus
from megatron_nucleus.data.curation.engines import Engine, WorkerDied
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.row_part import RowTask, run_part, trail_of
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.data.curation.store import Record, Store
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic

_MAX_CRASHES_PER_PART = 20


class Run(NamedTuple):
    """What every stage of one curation needs. lines: its recipe. retry: try again what failed for a passing reason."""

    store: Store
    parts: tuple[str, ...]
    engine: Engine
    source: PayloadSource
    retry: bool
    lines: tuple[Line, ...] = ()


def run_stage(
    run: Run, level: int, line: Line, progress: Callable[[Record], Any] = lambda record: None
) -> list[Record]:
    """Bring every part of a stage up to date; returns the records in part order.

    progress: called once per part, also for those that were there already.

    Raises:
        UserError: what a stage raises about the settings or the surroundings (no model at an endpoint, a full disk).
        DataError: a part whose process is killed before its first row, or again and again.
    """
    stage, settings = line.load()
    version = stage.version(settings)
    folder = Path(run.store.work) / run.store.levels[level].folder
    folder.mkdir(parents=True, exist_ok=True)
    runner = _run_rows if stage.kind == "rows" else run_corpus
    records = runner(run, level, line, version, folder, progress)
    clear_strays(folder, set(run.parts))
    summary = {
        "stage": line.name,
        "version": version,
        "parts": len(run.parts),
        "counts": tables.total(record.counts for record in records),
    }
    write_json_atomic(folder / tables.SUCCESS, summary)
    return records


def clear_strays(folder: Path, parts: set[str]) -> None:
    """Remove what killed processes left half written, and parts that the input no longer has."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in parts:
            shutil.rmtree(path)
        elif path.name.startswith("."):
            path.unlink()


def _run_rows(
    run: Run, level: int, line: Line, version: str, folder: Path, progress: Callable[[Record], Any]
) -> list[Record]:
    stage, settings = line.load()
    records: dict[str, Record] = {}
    pending = []
    for part in run.parts:
        before, here = run.store.finished(level - 1, part), run.store.record(level, part)
        fits = here is not None and here.version == version and here.input == before.result
        if here is not None and fits and not (run.retry and here.retry):
            records[part] = here
            progress(here)
        else:
            pending.append(RowTask(run.store, level, part, line, version, before.result, run.source, fits))
    lost = []
    for task, result in run.engine.map(run_part, pending, stage.gpus(settings)):
        if isinstance(result, WorkerDied):
            lost.append(task)
        else:
            records[task.part] = result
            progress(result)
    for task in lost:
        records[task.part] = _run_alone(run.engine, task, stage.gpus(settings))
        progress(records[task.part])
    return [records[part] for part in run.parts]


def _run_alone(engine: Engine, task: RowTask, gpus: float) -> Record:
    """Run a part in a process of its own, row by row, skipping one more row each time that process dies."""
    task = task._replace(careful=True)
    trail = trail_of(task.store, task.level, task.part)
    for _ in range(_MAX_CRASHES_PER_PART + 1):
        write_atomic(trail, b"")
        result = engine.alone(run_part, task, gpus)
        if not isinstance(result, WorkerDied):
            return result
        mark = trail.read_bytes()
        if not mark:
            raise DataError(
                f"stage {task.line.name}: the process for {task.part} was killed before its first row "
                f"({result.detail}); is there enough memory?"
            )
        task = task._replace(skip=task.skip | {int.from_bytes(mark, "little")})
    raise DataError(
        f"stage {task.line.name}: {task.part} killed its process {_MAX_CRASHES_PER_PART + 1} times"
    )
