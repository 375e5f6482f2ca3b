"""Curation from end to end: scan -> the stages of the recipe -> aspect buckets -> shards -> index -> report.

Output is complete when ``manifest.json`` is there. Everything before it is written under a temporary name and
renamed, and finished parts are found again, so the same command goes on where a killed run stopped. The result depends
on the input and the settings, not on the engine or the number of workers.

The tables of all stages stay in ``OUTPUT/stages`` (`store`): what was measured of every image that was seen, kept or
not. ``retry_failed`` uses them to run again only what failed for a passing reason, and ``update`` to run again only
what other settings or another input change.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from megatron_nucleus.data import manifest
from megatron_nucleus.data.curation import pack, readers, recipe, report, results, runner, shard_task
from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines import WorkerDied, open_engine
from megatron_nucleus.data.curation.results import StageResult
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.curation.stage import PayloadSource, deciding
from megatron_nucleus.data.curation.store import Record, Store
from megatron_nucleus.utils.config import to_dict
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive
from megatron_nucleus.utils.staging import explain_writing

log = logging.getLogger(__name__)

TOOL = "curate"
STAGES = "stages"
_CAPTION_HELP = 'put NAME.txt (the caption) or NAME.json ({"caption": "..."}) beside NAME.jpg'


class _Job(NamedTuple):
    """What was asked for. claimed: all that decides the content, as plain values."""

    source: Path
    output: Path
    settings: Settings
    lines: tuple[recipe.Line, ...]
    found: readers.Scan
    claimed: dict


def curate(
    source: str | Path,
    output: str | Path,
    settings: Settings | None = None,
    *,
    retry_failed: bool = False,
    update: bool = False,
) -> dict:
    """Curate the images under ``source`` into the data set folder ``output``; returns the counts and paths.

    Running it again on a finished output with the same input (by names and sizes) and settings does nothing and
    says so (``already_complete``), unless one of these finds work to do:

    - ``retry_failed``: rows failed for a passing reason. Those alone are tried again.
    - ``update``: settings, stages, the files they rely on, or the input are others (of files the time of change
      counts, too), or a shard is lost. What no longer fits is made again.

    A finished data set is whole and in use until its first shard is about to change; where either of them fails
    before that, it stays as it was.

    Raises:
        ConfigError: a missing input, a recipe that cannot run, or an output folder in use for something else or that
            cannot be written; a finished output made differently, without ``update``.
        DataError: nothing to use in the input, with the reasons; an input that changes meanwhile; a full disk.
    """
    settings = settings or Settings()
    # A worker may run in another folder, and a stage may change it.
    source, output = Path(source).absolute(), Path(output).absolute()
    started = time.perf_counter()
    lines = recipe.resolve(settings.recipe, settings.stage_sections())
    versions = recipe.versions(lines)
    found = readers.scan(source, settings.readers)
    _check_folders(source, output)
    _check_input(source, found, lines)
    for warning in found.warnings:
        log.warning("%s", warning)
    job = _Job(source, output, settings, lines, found, _claimed_settings(settings, lines, found))
    state = manifest.claim_output(output, TOOL, job.claimed, update=update)
    store = Store(str(output / STAGES), recipe.levels(lines))
    if state == "complete":
        made, _ = manifest.read_manifest(output)
        again = retry_failed and made["counts"]["retryable"]
        if again or (update and _is_outdated(output, made, versions, store, found)):
            state = "outdated"
        else:
            manifest.check_files(output, made)
    timings: list[StageResult] = []
    if state != "complete":
        keeps = "finished work is kept, and the same command goes on from there"
        with explain_writing(output, keeps), exclusive(output, "--output"):
            manifest.begin_update(output, TOOL, job.claimed)
            timings = _run(job, store, retry_failed)
            _tidy(output)
    return _summary(output, state == "complete", time.perf_counter() - started, timings)


def _claimed_settings(settings: Settings, lines: Sequence[recipe.Line], found: readers.Scan) -> dict:
    """All that decides the content, as plain values."""
    raw = settings.recipe.stages.lines
    stages = [
        {"stage": line.name, "from": given.spec, "settings": deciding(line.load()[1])}
        for line, given in zip(lines, raw, strict=True)
    ]
    return {
        "input_fingerprint": found.fingerprint,
        "recipe": stages,
        "readers": to_dict(settings.readers),
        "curation": to_dict(settings.curation),
    }


def _is_outdated(
    output: Path, made: dict, versions: dict[str, str], store: Store, found: readers.Scan
) -> bool:
    """Whether a finished data set of the same settings was made by other stages, from files changed since, or has lost
    files of its own."""
    try:
        manifest.check_files(output, made)
    except DataError as error:
        log.warning("%s", error)
        return True
    if [(stage["stage"], stage["version"]) for stage in made["stages"]] != list(versions.items()):
        return True
    records = [(store.record(0, task.name), task.stamp) for task in found.tasks]
    return any(record is None or record.input != stamp for record, stamp in records)


def _summary(output: Path, already: bool, wall_s: float, timings: Sequence[StageResult]) -> dict:
    made, _ = manifest.read_manifest(output)
    return {
        **made["counts"],
        "output": str(output.absolute()),
        "shards": [str((output / s["tar"]).absolute()) for s in made["shards"]],
        "index": [str((output / f["path"]).absolute()) for f in made["index"]],
        "report": str((output / "report.html").absolute()),
        "buckets": {b: v["samples"] for b, v in made["buckets"].items()},
        "merged_buckets": made["merged_buckets"],
        "stages": [
            {"stage": t.name, **t.counts, "wall_s": t.wall_s, "images_per_s": _rate(t.counts["in"], t.wall_s)}
            for t in timings
        ],
        "already_complete": already,
        "wall_s": wall_s,
        "images_per_s": 0.0 if already else _rate(made["counts"]["seen"], wall_s),
    }


def _rate(count: int, wall_s: float) -> float:
    return count / wall_s if wall_s > 0 else 0.0


def _check_folders(source: Path, output: Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise ConfigError(f"--output {output}: must lie beside --input {source}, not inside or around it")


def _check_input(source: Path, found: readers.Scan, lines: Sequence[recipe.Line]) -> None:
    if not found.tasks:
        raise DataError(
            f"{source}: no images and no .tar files in it; give a folder of images with .txt or .json captions "
            "beside them, of tables that name image files, or of WebDataset tars"
        )

    if not any(line.settings.get("require_captions") for line in lines):
        return
    in_folder_only = not found.tars and not found.tables
    if in_folder_only and not any(item.sidecars for task in found.tasks for item in task.items):
        raise DataError(f"{source}: {found.files} files and not one has a caption; {_CAPTION_HELP}")


def _tidy(output: Path) -> None:
    """Remove what a killed process left half written."""
    for path in output.glob(".*.tmp*"):
        path.unlink()


def _run(job: _Job, store: Store, retry: bool) -> list[StageResult]:
    limits = job.settings.curation
    source_of = PayloadSource(str(job.source), limits.max_file_bytes, limits.max_pixels)
    parts = tuple(task.name for task in job.found.tasks)
    with contextlib.closing(open_engine(job.settings.engine)) as engine:
        run = runner.Run(store, parts, engine, source_of, retry, job.lines)
        _remove_other_levels(store)
        done = [_list(run, job.found)]
        _check_listed(job, done[0])
        for level, line in enumerate(job.lines, 1):
            done.append(_run_level(run, level, line))
            _check_captions(job.source, level, done)
        counts = results.reconcile(done, job.found)
        if not counts["kept"]:
            raise DataError(f"{job.source}: {_report_nothing(job, run, counts, done)}")
        manifest.withdraw(job.output)
        results.write_quarantine(job.output, run)
        try:
            _pack(job, run, counts, done)
        except shard_task.InputChanged as change:  # what was found out about that part no longer holds
            store.forget(change.part)
            raise
    return done


def _report_nothing(job: _Job, run: runner.Run, counts: dict, done: Sequence[StageResult]) -> str:
    """Say why nothing is left; with a report, unless a data set is there that has its own."""
    why = results.nothing_left(run, counts)
    if (job.output / manifest.MANIFEST).is_file():
        return f"{why}; the finished data set {job.output} stays as it was"
    results.write_quarantine(job.output, run)
    report.write(job.output, job.source, job.settings, counts, done, run, None)
    return f"{why}; see {job.output}/report.html"


def _pack(job: _Job, run: runner.Run, counts: dict, done: Sequence[StageResult]) -> None:
    """Shards, index, report, and last the manifest."""
    versions = {result.name: result.version for result in done[1:]}
    with _progress(pack.PACK, counts["kept"]) as bar:
        packed = pack.pack_all(job.output, run, job.settings.curation, versions, bar.update)
    counts["captions"] = _sum(p.captions for p in packed.shards)
    counts["caption_sources"] = _sum(p.sources for p in packed.shards)
    index_files = pack.write_index(job.output, packed)
    report.write(job.output, job.source, job.settings, counts, done, run, packed)
    manifest.write_manifest(
        job.output,
        tool=TOOL,
        settings=job.claimed,
        shards=[p.shard for p in packed.shards],
        index_files=index_files,
        counts=counts,
        merged_buckets=packed.moved,
        extra={"stages": results.stage_facts(done), "inputs": results.input_facts(run, job.found)},
    )


def _remove_other_levels(store: Store) -> None:
    """Folders of stages that the recipe no longer has in that place."""
    wanted = {level.folder for level in store.levels} | {f"{len(store.levels):02d}-{pack.PACK}"}
    for path in Path(store.work).glob("*"):
        if path.name not in wanted:
            shutil.rmtree(path)


def _list(run: runner.Run, found: readers.Scan) -> StageResult:
    """Level 0: the items of every part, as the readers find them."""
    started = time.perf_counter()
    pending = []
    for task in found.tasks:
        record = run.store.record(0, task.name)
        if record is None or record.input != task.stamp:
            pending.append(_ListTask(run.store, task))
    folder = Path(run.store.work, run.store.levels[0].folder)
    folder.mkdir(parents=True, exist_ok=True)
    for task, result in run.engine.map(list_part, pending):
        if isinstance(result, WorkerDied):
            raise DataError(f"listing {task.task.name}: a worker was lost ({result.detail}); run again")
    runner.clear_strays(folder, set(run.parts))
    counts = tables.total(record.counts for record in _records(run, 0))
    return StageResult("list", "", counts, {}, 0, time.perf_counter() - started if pending else 0.0)


class _ListTask(NamedTuple):
    store: Store
    task: readers.Task


def list_part(job: _ListTask) -> Record:
    """Write the items of one part; called in a worker."""
    table = readers.list_part(job.task)
    columns = {"position": np.arange(len(table), dtype=np.int32), **{n: table[n] for n in table.column_names}}
    for field in recipe.START_SCHEMA:
        if field.name not in columns:
            empty = [] if pa.types.is_list(field.type) else None
            columns[field.name] = pa.array([empty] * len(table), field.type)
    numbered = pa.table(columns, schema=pa.schema([tables.POSITION, *recipe.START_SCHEMA]))
    nothing = tables.DROPPED_SCHEMA.empty_table()
    return job.store.write(0, job.task.name, numbered, nothing, version="", entry=job.task.stamp)


def _records(run: runner.Run, level: int) -> list[Record]:
    return [run.store.finished(level, part) for part in run.parts]


def _run_level(run: runner.Run, level: int, line: recipe.Line) -> StageResult:
    started = time.perf_counter()
    arrived = sum(record.counts["kept"] for record in _records(run, level - 1))
    with _progress(line.name, arrived) as bar:
        records = runner.run_stage(run, level, line, lambda record: bar.update(record.counts["in"]))
    stage, settings = line.load()
    counts = tables.total(record.counts for record in records)
    notes: dict[str, int] = {}
    for record in records:
        notes = tables.add_counts(notes, record.notes)
    retry = sum(record.retry for record in records)
    return StageResult(
        line.name, stage.version(settings), counts, notes, retry, time.perf_counter() - started
    )


def _check_listed(job: _Job, listed: StageResult) -> None:
    if not listed.counts["kept"]:
        raise DataError(
            f"{job.source}: not one image in it: its {job.found.tars} tars and {job.found.tables} tables are empty"
        )


def _check_captions(source: Path, level: int, done: Sequence[StageResult]) -> None:
    """Say at once that an input has no captions at all, when that is why nothing is left."""
    counts = done[-1].counts
    if level == 1 and not counts["kept"] and counts["quarantined"].get("missing_caption"):
        raise DataError(
            f"{source}: {counts['in']} items and not one usable image has a caption; {_CAPTION_HELP}, in the folder "
            "or in the tar, or give --no-require-captions and a recipe with a captioner"
        )


def _progress(name: str, images_total: int | None) -> tqdm:
    return tqdm(
        total=images_total, desc=name, unit="img", file=sys.stderr, mininterval=0.5, dynamic_ncols=True
    )


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in parts:
        out = tables.add_counts(out, part)
    return out
