"""Curation from end to end: scan -> inspect -> exact duplicates -> aspect buckets -> pack -> index -> report.

Output is complete when ``manifest.json`` is there. Everything before it is written under a temporary name and
renamed, and finished tasks are found again, so the same command goes on where a killed run stopped, unless the
input was touched since. The result depends on the input and the settings, not on the number of workers.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_nucleus.data import buckets, images, index, manifest, shards
from megatron_nucleus.data.curation import captions, dedup, filters, pack, readers, report, runner
from megatron_nucleus.data.curation.filters import CurationConfig
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive, write_atomic
from megatron_nucleus.utils.staging import explain_writing

TOOL = "curate"
_WORK = ".work"
_STAMP = "input_stamp"  # of the input that the work was done on


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Where the work runs; changes nothing in the result."""

    engine: str = knob("local", "local: a process pool on this machine", choices=("local",))
    workers: int = knob(0, "processes; 0: one per core this process may use, 1: no pool", unit="processes")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: 0 or more")

    def worker_count(self) -> int:
        """Processes to use."""
        return self.workers or len(os.sched_getaffinity(0))


def curate(
    source: str | Path,
    output: str | Path,
    config: CurationConfig | None = None,
    engine: EngineConfig | None = None,
) -> dict:
    """Curate the images under ``source`` into the data set folder ``output``; returns the counts and paths.

    Running it again on a finished output with the same input (by names and sizes) and settings does nothing and
    says so (``already_complete``).

    Raises:
        ConfigError: a missing input, or an output folder in use for something else or that cannot be written.
        DataError: nothing to use in the input, with the reasons; an input that changes meanwhile; a full disk.
    """
    config, engine = config or CurationConfig(), engine or EngineConfig()
    source, output = Path(source), Path(output)
    started = time.perf_counter()
    found = readers.scan(source)
    _check_folders(source, output)
    _check_input(source, found)
    settings = {"input_fingerprint": found.fingerprint, "curation": dataclasses.asdict(config)}
    state = manifest.claim_output(output, TOOL, settings)
    if state != "complete" or (output / _WORK).exists():
        keeps = "finished work is kept, and the same command goes on from there"
        with explain_writing(output, keeps), exclusive(output, "--output"):
            if state != "complete":
                _run(source, output, found, config, engine, settings)
            _tidy(output)
    made, _ = manifest.read_manifest(output)
    wall_s = time.perf_counter() - started
    rate = 0.0 if state == "complete" else made["counts"]["seen"] / wall_s
    return {
        **made["counts"],
        "output": str(output.absolute()),
        "shards": [str((output / s["tar"]).absolute()) for s in made["shards"]],
        "index": [str((output / f["path"]).absolute()) for f in made["index"]],
        "report": str((output / "report.html").absolute()),
        "buckets": {b: v["samples"] for b, v in made["buckets"].items()},
        "merged_buckets": made["merged_buckets"],
        "already_complete": state == "complete",
        "wall_s": wall_s,
        "images_per_s": rate,
    }


def _check_folders(source: Path, output: Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise ConfigError(f"--output {output}: must lie beside --input {source}, not inside or around it")


def _check_input(source: Path, found: readers.Scan) -> None:
    if not found.tasks:
        raise DataError(
            f"{source}: no images and no .tar files in it; give a folder of images with .txt or .json captions "
            "beside them, or of WebDataset tars"
        )
    if not found.tars and not any(item.sidecars for task in found.tasks for item in task.items):
        raise DataError(
            f"{source}: {found.files} files and not one has a caption; put NAME.txt (the caption) or NAME.json "
            '({"caption": "..."}) beside NAME.jpg'
        )


def _open_work(work: Path, stamp: str) -> None:
    """Keep what an earlier attempt did only when no input file was touched since."""
    path = work / _STAMP
    if work.is_dir() and not (path.is_file() and path.read_text() == stamp):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    write_atomic(path, stamp)


def _tidy(output: Path) -> None:
    """Remove intermediate files of a finished data set, and what a killed process left half written."""
    shutil.rmtree(output / _WORK, ignore_errors=True)
    for path in output.glob(".*.tmp*"):
        path.unlink()


def _run(
    source: Path,
    output: Path,
    found: readers.Scan,
    config: CurationConfig,
    engine: EngineConfig,
    settings: dict,
) -> None:
    work, workers = output / _WORK, engine.worker_count()
    _open_work(work, found.stamp)
    inspect = runner.make_stage(
        "inspect", filters.inspect_task, config, [filters, readers, captions, images], found.fingerprint
    )
    known = found.files if not found.tars else None
    with _progress("inspect", known) as bar:
        results = runner.run_stage(inspect, found.tasks, work / "inspect", workers, _advance(bar))
    counts = runner.total(results)
    _check_captions(source, results)
    names = [task.name for task in found.tasks]
    decisions = dedup.decide(work / "inspect", names)
    merged, duplicates = dedup.merge_duplicates(work / "inspect", names, decisions)
    counts = _reconcile(counts, found, decisions, len(duplicates))
    quarantine = _write_quarantine(output, work / "inspect", names, duplicates)
    if not counts["kept"]:
        report.write(output, source, config, counts, {}, {}, work / "inspect", names, decisions)
        raise DataError(_nothing_left(source, output, counts, quarantine))
    assigned, moved = pack.assign_buckets(decisions, config.min_bucket_images)
    try:
        packed = _pack(source, output, names, decisions, assigned, merged, config, inspect, workers)
    except pack.InputChanged:  # what was found out about the input no longer holds, and with it the plan
        shutil.rmtree(work)
        raise
    counts["captions"] = _sum(p["captions"] for p in packed)
    counts["caption_sources"] = _sum(p["sources"] for p in packed)
    infos = [shards.ShardInfo(*p["shard"]) for p in packed]
    index_files = _write_index(output, work / "pack", infos)
    bucket_counts = _sum({info.bucket: info.samples} for info in infos)
    report.write(output, source, config, counts, bucket_counts, moved, work / "inspect", names, decisions)
    manifest.write_manifest(
        output,
        tool=TOOL,
        settings=settings,
        shards=infos,
        index_files=index_files,
        counts=counts,
        merged_buckets=moved,
    )


def _pack(
    source: Path,
    output: Path,
    names: list[str],
    decisions: dedup.Decisions,
    assigned: np.ndarray,
    merged: dict[int, dict],
    config: CurationConfig,
    inspect: runner.Stage,
    workers: int,
) -> list[dict]:
    stage = runner.make_stage(
        "pack", pack.pack_task, config, [pack, dedup, buckets, shards, index], inspect.version
    )
    versions = {"inspect": inspect.version, "pack": stage.version}
    plan = pack.plan_shards(decisions, assigned, config.max_shard_bytes)
    tasks = []
    for tar, positions in plan:
        extra = {p: merged[p] for p in positions.tolist() if p in merged}
        tasks.append(
            pack.PackTask(
                name=Path(tar).stem,
                bucket=buckets.BUCKETS[int(assigned[positions[0]])],
                input_root=str(source),
                output_root=str(output),
                inspected=str(output / _WORK / "inspect"),
                task_names=tuple(names),
                task=decisions.task[positions],
                row=decisions.row[positions],
                merged={(int(decisions.task[p]), int(decisions.row[p])): v for p, v in extra.items()},
                stage_versions=versions,
            )
        )
    wanted = {tar for tar, _ in plan}
    for path in (output / "shards").glob("*"):  # of an earlier, unfinished plan
        if f"shards/{path.name}" not in wanted:
            path.unlink()
    _forget_lost_shards(output / _WORK / "pack", output / "shards")
    with _progress("pack", int(decisions.keep.sum())) as bar:
        return runner.run_stage(stage, tasks, output / _WORK / "pack", workers, _advance(bar))


def _forget_lost_shards(records: Path, folder: Path) -> None:
    for path in records.glob("*.success.json"):
        if not (folder / f"{path.name.removesuffix('.success.json')}.tar").is_file():
            path.unlink()


def _write_index(output: Path, packed: Path, infos: list[shards.ShardInfo]) -> list[dict]:
    shutil.rmtree(output / "index", ignore_errors=True)
    parts = index.ParquetParts(output / "index", index.INDEX_SCHEMA)
    for info in infos:
        parts.add_table(pq.read_table(packed / f"{Path(info.tar).stem}.parquet", partitioning=None))
    return parts.close()


def _write_quarantine(output: Path, inspected: Path, names: list[str], duplicates: list[dict]) -> Path:
    """Everything seen and not kept, in input order, duplicates last."""
    folder = output / "quarantine"
    shutil.rmtree(folder, ignore_errors=True)
    parts = index.ParquetParts(folder, index.QUARANTINE_SCHEMA)
    for name in names:
        parts.add_table(pq.read_table(inspected / f"{name}.dropped.parquet", partitioning=None))
    for row in duplicates:
        parts.add(row)
    parts.close()
    return folder


def _reconcile(counts: dict, found: readers.Scan, decisions: dedup.Decisions, duplicates: int) -> dict:
    rejected = dict(counts["rejected"])
    if duplicates:
        rejected["exact_duplicate"] = duplicates
    out = {
        "seen": counts["in"],
        "kept": int(decisions.keep.sum()),
        "rejected": dict(sorted(rejected.items())),
        "quarantined": counts["quarantined"],
        "notes": counts["notes"],
        "ignored_files": found.ignored,
        "captions_without_image": found.captions_without_image,
    }
    if out["seen"] != out["kept"] + sum(rejected.values()) + sum(out["quarantined"].values()):
        raise AssertionError(f"counts do not reconcile: {out}")
    return out


def _check_captions(source: Path, results: list[dict]) -> None:
    if any(r["kept"] for r in results) or any(r["with_captions"] for r in results):
        return
    seen = sum(r["in"] for r in results)
    missing = sum(r["quarantined"].get("missing_caption", 0) for r in results)
    if missing:
        raise DataError(
            f"{source}: {seen} items and not one has a caption; put KEY.txt (the caption) or KEY.json "
            '({"caption": "..."}) beside KEY.jpg, in the folder or in the tar'
        )


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


def _sum(parts: Iterator[dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            out[key] = out.get(key, 0) + value
    return dict(sorted(out.items()))


def _progress(name: str, images_total: int | None) -> tqdm:
    return tqdm(
        total=images_total, desc=name, unit="img", file=sys.stderr, mininterval=0.5, dynamic_ncols=True
    )


def _advance(bar: tqdm):
    return lambda counts: bar.update(counts["in"])
