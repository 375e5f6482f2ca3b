"""Curation from end to end: scan -> the stages of the recipe -> aspect buckets -> shards -> index -> report.

Output is complete when ``manifest.json`` is there. Everything before it is written under a temporary name and
renamed, and finished parts are found again, so the same command goes on where a killed run stopped. The result depends
on the input and the settings, not on the engine or the number of workers.

The tables of all stages stay in ``OUTPUT/stages`` (`store`): what was measured of every image that was seen, kept or
not. ``retry_failed`` uses them to run again only what failed for a passing reason.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_nucleus.data import index, manifest
from megatron_nucleus.data.curation import pack, readers, recipe, report, runner, shard_task
from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines import WorkerDied, open_engine
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.data.curation.store import Record, Store
from megatron_nucleus.utils.config import to_dict
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive
from megatron_nucleus.utils.staging import explain_writing

log = logging.getLogger(__name__)

TOOL = "curate"
STAGES = "stages"
_CAPTION_HELP = 'put NAME.txt (the caption) or NAME.json ({"caption": "..."}) beside NAME.jpg'


class StageResult(NamedTuple):
    """A stage's figures over the whole input. counts: in, kept, rejected, quarantined. wall_s: 0 when it was done."""

    name: str
    version: str
    counts: dict[str, Any]
    notes: dict[str, int]
    retry: int
    wall_s: float


def curate(
    source: str | Path, output: str | Path, settings: Settings | None = None, *, retry_failed: bool = False
) -> dict:
    """Curate the images under ``source`` into the data set folder ``output``; returns the counts and paths.

    Running it again on a finished output with the same input (by names and sizes) and settings does nothing and
    says so (``already_complete``), unless ``retry_failed`` finds rows that failed for a passing reason.

    Raises:
        ConfigError: a missing input, a recipe that cannot run, or an output folder in use for something else or that
            cannot be written.
        DataError: nothing to use in the input, with the reasons; an input that changes meanwhile; a full disk.
    """
    settings = settings or Settings()
    # A worker may run in another folder, and a stage may change it.
    source, output = Path(source).absolute(), Path(output).absolute()
    started = time.perf_counter()
    lines = recipe.resolve(settings.recipe, settings.stage_sections())
    found = readers.scan(source, settings.readers)
    _check_folders(source, output)
    _check_input(source, found, lines)
    for warning in found.warnings:
        log.warning("%s", warning)
    claimed = _claimed_settings(settings, lines, found)
    state = manifest.claim_output(output, TOOL, claimed)
    timings: list[StageResult] = []
    if state == "complete":
        manifest.check_files(output, manifest.read_manifest(output)[0])
    store = Store(str(output / STAGES), recipe.levels(lines))
    if state == "complete" and retry_failed and _has_failed(store, found):
        manifest.reopen(output, TOOL, claimed)
        state = "resume"
    if state != "complete":
        keeps = "finished work is kept, and the same command goes on from there"
        with explain_writing(output, keeps), exclusive(output, "--output"):
            timings = _run(source, output, found, settings, lines, store, claimed, retry_failed)
            _tidy(output)
    return _summary(output, state == "complete", time.perf_counter() - started, timings)


def _claimed_settings(settings: Settings, lines: Sequence[recipe.Line], found: readers.Scan) -> dict:
    """All that decides the content, as plain values."""
    raw = settings.recipe.stages.lines
    stages = [
        {"stage": line.name, "from": given.spec, "settings": line.settings}
        for line, given in zip(lines, raw, strict=True)
    ]
    return {
        "input_fingerprint": found.fingerprint,
        "recipe": stages,
        "readers": to_dict(settings.readers),
        "curation": to_dict(settings.curation),
    }


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


def _has_failed(store: Store, found: readers.Scan) -> bool:
    """Whether a finished data set has rows worth another try."""
    records = (
        store.record(level, task.name) for level in range(1, len(store.levels)) for task in found.tasks
    )
    return any(record is not None and record.retry for record in records)


def _tidy(output: Path) -> None:
    """Remove what a killed process left half written."""
    for path in output.glob(".*.tmp*"):
        path.unlink()


def _run(
    source: Path,
    output: Path,
    found: readers.Scan,
    settings: Settings,
    lines: tuple[recipe.Line, ...],
    store: Store,
    claimed: dict,
    retry: bool,
) -> list[StageResult]:
    limits = settings.curation
    source_of = PayloadSource(str(source), limits.max_file_bytes, limits.max_pixels)
    parts = tuple(task.name for task in found.tasks)
    with contextlib.closing(open_engine(settings.engine)) as engine:
        run = runner.Run(store, parts, engine, source_of, retry, lines)
        _remove_other_levels(store)
        results = [_list(run, found)]
        for level, line in enumerate(lines, 1):
            results.append(_run_level(run, level, line))
            _check_captions(source, level, results)
        counts = _reconcile(results, found)
        quarantine = _write_quarantine(output, run)
        if not counts["kept"]:
            report.write(output, source, settings, counts, results, run, None)
            raise DataError(_nothing_left(source, output, counts, quarantine))
        try:
            versions = {result.name: result.version for result in results[1:]}
            with _progress(pack.PACK, counts["kept"]) as bar:
                packed = pack.pack_all(output, run, settings.curation, versions, bar.update)
        except shard_task.InputChanged as change:  # what was found out about that part no longer holds
            store.forget(change.part)
            raise
    counts["captions"] = _sum(p.captions for p in packed.shards)
    counts["caption_sources"] = _sum(p.sources for p in packed.shards)
    infos = [p.shard for p in packed.shards]
    index_files = pack.write_index(output, packed)
    report.write(output, source, settings, counts, results, run, packed)
    manifest.write_manifest(
        output,
        tool=TOOL,
        settings=claimed,
        shards=infos,
        index_files=index_files,
        counts=counts,
        merged_buckets=packed.moved,
        extra={"stages": _stage_facts(results), "inputs": _inputs(run, found)},
    )
    return results


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


def _check_captions(source: Path, level: int, results: Sequence[StageResult]) -> None:
    """Say at once that an input has no captions at all, when that is why nothing is left."""
    counts = results[-1].counts
    if level == 1 and not counts["kept"] and counts["quarantined"].get("missing_caption"):
        raise DataError(
            f"{source}: {counts['in']} items and not one usable image has a caption; {_CAPTION_HELP}, in the folder "
            "or in the tar, or give --no-require-captions and a recipe with a captioner"
        )


def _reconcile(results: Sequence[StageResult], found: readers.Scan) -> dict:
    counts = results[0].counts
    rejected: dict[str, int] = {}
    quarantined: dict[str, int] = {}
    notes: dict[str, int] = {}
    for before, result in itertools.pairwise(results):
        if result.counts["in"] != before.counts["kept"]:
            raise AssertionError(
                f"stage {result.name} saw {result.counts['in']} of {before.counts['kept']} rows"
            )
        rejected = tables.add_counts(rejected, result.counts["rejected"])
        quarantined = tables.add_counts(quarantined, result.counts["quarantined"])
        notes = tables.add_counts(notes, result.notes)
    out = {
        "seen": counts["kept"],
        "kept": results[-1].counts["kept"],
        "rejected": rejected,
        "quarantined": quarantined,
        "retryable": sum(result.retry for result in results),
        "notes": notes,
        "ignored_files": found.ignored,
        "captions_without_image": found.captions_without_image,
        "tables": found.tables,
        "warnings": list(found.warnings),
    }
    if out["seen"] != out["kept"] + sum(rejected.values()) + sum(quarantined.values()):
        raise AssertionError(f"counts do not reconcile: {out}")
    return out


def _write_quarantine(output: Path, run: runner.Run) -> Path:
    """Everything seen and not kept, in input order."""
    folder = output / "quarantine"
    shutil.rmtree(folder, ignore_errors=True)
    parts = index.ParquetParts(folder, index.QUARANTINE_SCHEMA)
    for part in run.parts:
        dropped = [run.store.dropped(level, part) for level in range(1, len(run.store.levels))]
        together = pa.concat_tables(dropped).sort_by("position")
        parts.add_table(together.select(index.QUARANTINE_SCHEMA.names))
    parts.close()
    return folder


def _stage_facts(results: Sequence[StageResult]) -> list[dict]:
    """Name, version and counts of every stage, for the manifest."""
    return [{"stage": r.name, "version": r.version, **r.counts, "notes": r.notes} for r in results[1:]]


def _inputs(run: runner.Run, found: readers.Scan) -> list[dict]:
    """Every part of the input: where it comes from, and how many items it has."""
    return [
        {"part": task.name, "from": readers.describe(task), "items": record.counts["kept"]}
        for task, record in zip(found.tasks, _records(run, 0), strict=True)
    ]


def _nothing_left(source: Path, output: Path, counts: dict, quarantine: Path) -> str:
    reasons = {**counts["rejected"], **counts["quarantined"]}
    listed = ", ".join(f"{n} {r}" for r, n in sorted(reasons.items(), key=lambda p: -p[1]))
    first = next(iter(sorted(quarantine.glob("*.parquet"))), None)
    example = ""
    if first is not None:
        row = pq.read_table(first, partitioning=None).slice(0, 1).to_pylist()[0]
        example = f"; first: {row['item']} ({row['detail']})"
    return (
        f"{source}: none of {counts['seen']} items can be used ({listed}){example}; see {output}/report.html"
    )


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in parts:
        out = tables.add_counts(out, part)
    return out


def _progress(name: str, images_total: int | None) -> tqdm:
    return tqdm(
        total=images_total, desc=name, unit="img", file=sys.stderr, mininterval=0.5, dynamic_ncols=True
    )
