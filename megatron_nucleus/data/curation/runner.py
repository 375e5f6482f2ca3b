"""Runs a stage over tasks: files to files, each task once, in a process pool or in this process.

The contract of a stage:

- It is a module-level function ``run(task, settings, folder, skip, started) -> counts`` that writes its results
  under ``folder`` with names that depend on the task alone, each through a temporary name and a rename.
- ``counts`` holds at least ``in``, ``kept``, ``rejected {reason: n}`` and ``quarantined {reason: n}``, and they
  reconcile: in = kept + rejected + quarantined. The runner checks it and then writes ``<task>.success.json``.
- Its version is a hash of the code and the settings it depends on. A task whose success file has that version
  is not run again: after a crash only unfinished tasks are.
- It calls ``started(i)`` before item i. If a decoder takes the whole process down, the task runs again alone with
  that item in ``skip``; the stage quarantines it.

Only descriptors and counts travel between processes, never pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_nucleus.data.images import quiet_decoding
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic

_MAX_CRASHES_PER_TASK = 20


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of curation; see the module docstring."""

    name: str
    run: Callable[..., dict]
    settings: Any  # a frozen dataclass, picklable
    version: str


def make_stage(
    name: str, run: Callable[..., dict], settings: Any, modules: list[ModuleType], *more: str
) -> Stage:
    """A stage whose version covers its settings, the source of ``modules`` and ``more`` (such as earlier versions)."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    for text in more:
        digest.update(text.encode())
    return Stage(name, run, settings, digest.hexdigest()[:16])


def run_stage(
    stage: Stage,
    tasks: list,
    folder: Path,
    workers: int,
    progress: Callable[[dict], None] = lambda counts: None,
) -> list[dict]:
    """Run ``stage`` on every task (each has a ``name``); returns their counts in task order.

    workers: 0 or 1 runs in this process. progress: called with the counts of each finished task.

    Raises:
        DataError: what a stage raises, or a task that keeps crashing its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    pending = []
    for task in tasks:
        done = _finished(stage, task, folder)
        if done is None:
            pending.append(task)
        else:
            results[task.name] = done
            progress(done)
    runner = _run_here if workers <= 1 else _run_pool
    for task, counts in runner(stage, pending, folder, workers):
        results[task.name] = counts
        progress(counts)
    return [results[task.name] for task in tasks]


def total(results: list[dict]) -> dict:
    """Sum of the counts of many tasks; reasons sorted by name."""
    out: dict = {"in": 0, "kept": 0, "rejected": {}, "quarantined": {}, "notes": {}}
    for counts in results:
        out["in"] += counts["in"]
        out["kept"] += counts["kept"]
        for group in ("rejected", "quarantined", "notes"):
            for reason, number in counts.get(group, {}).items():
                out[group][reason] = out[group].get(reason, 0) + number
    for group in ("rejected", "quarantined", "notes"):
        out[group] = dict(sorted(out[group].items()))
    return out


def _finished(stage: Stage, task: Any, folder: Path) -> dict | None:
    path = folder / f"{task.name}.success.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove it and run again") from error
    return record["counts"] if record["version"] == stage.version else None


def run_task(stage: Stage, task: Any, folder: Path, skip: frozenset[int] = frozenset()) -> dict:
    """Run one task and record its success."""
    trail = os.open(_trail(folder, task), os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        with quiet_decoding():
            counts = stage.run(
                task, stage.settings, folder, skip, lambda i: os.pwrite(trail, i.to_bytes(8, "little"), 0)
            )
    finally:
        os.close(trail)
    out = sum(counts["rejected"].values()) + sum(counts["quarantined"].values())
    if counts["in"] != counts["kept"] + out:
        raise AssertionError(f"stage {stage.name}, task {task.name}: counts do not reconcile: {counts}")
    record = {"stage": stage.name, "version": stage.version, "counts": counts}
    write_json_atomic(folder / f"{task.name}.success.json", record)
    os.unlink(_trail(folder, task))
    return counts


def _trail(folder: Path, task: Any) -> Path:
    """File with the number of the item in work: what is left of a process that died."""
    return folder / f".{task.name}.item"


def _run_here(stage: Stage, tasks: list, folder: Path, workers: int) -> Iterator[tuple[Any, dict]]:
    for task in tasks:
        yield task, run_task(stage, task, folder)


def _run_pool(stage: Stage, tasks: list, folder: Path, workers: int) -> Iterator[tuple[Any, dict]]:
    """Keep two tasks per worker in flight. When a process dies, finish what was in flight one task at a time."""
    waiting = iter(tasks)
    running: dict[Future, Any] = {}
    pool = _pool(workers)
    try:
        while True:
            while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                running[pool.submit(run_task, stage, task, folder)] = task
            if not running:
                return
            try:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    counts = future.result()
                    yield running.pop(future), counts
            except BrokenProcessPool:
                pool.shutdown(wait=True)
                suspects = sorted(running.values(), key=lambda t: t.name)
                running = {}
                for task in suspects:
                    yield task, _run_alone(stage, task, folder)
                pool = _pool(workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_alone(stage: Stage, task: Any, folder: Path) -> dict:
    """Run a task in a process of its own, skipping one more item each time that process dies."""
    skip: frozenset[int] = frozenset()
    for _ in range(_MAX_CRASHES_PER_TASK + 1):
        done = _finished(stage, task, folder)
        if done is not None:
            return done
        write_atomic(_trail(folder, task), b"")
        with _pool(1) as pool:
            try:
                return pool.submit(run_task, stage, task, folder, skip).result()
            except BrokenProcessPool:
                trail = _trail(folder, task).read_bytes()
        if not trail:
            raise DataError(
                f"stage {stage.name}: the process for {task.name} was killed; is there enough memory?"
            )
        skip |= {int.from_bytes(trail, "little")}
    raise DataError(f"stage {stage.name}: {task.name} killed its process {_MAX_CRASHES_PER_TASK + 1} times")


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("forkserver")  # fork of a process with threads can hang
    context.set_forkserver_preload(["megatron_nucleus.data.curation.pipeline"])
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
    )


def _start_worker(parent: int) -> None:
    """The main process handles signals; a worker leaves when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent() -> None:
        while True:
            time.sleep(2)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
