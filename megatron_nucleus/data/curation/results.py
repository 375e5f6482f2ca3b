"""What a curation found out, over all parts: counts of every stage, and what became of every item.

The counts reconcile: what a stage saw is what the one before kept, and every item is kept, rejected or quarantined.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from megatron_nucleus.data import index
from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.runner import Run

QUARANTINE = "quarantine"


class StageResult(NamedTuple):
    """A stage's figures over the whole input. counts: in, kept, rejected, quarantined. wall_s: 0 when it was done."""

    name: str
    version: str
    counts: dict[str, Any]
    notes: dict[str, int]
    retry: int
    wall_s: float


def reconcile(results: Sequence[StageResult], found: readers.Scan) -> dict[str, Any]:
    """The counts of a data set, as its manifest holds them. results: of the list of items and of every stage.

    Raises:
        AssertionError: they do not add up.
    """
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


def dropped_rows(run: Run) -> Iterator[pa.Table]:
    """Everything seen and not kept (`index.QUARANTINE_SCHEMA`), part by part, in input order."""
    for part in run.parts:
        dropped = [run.store.dropped(level, part) for level in range(1, len(run.store.levels))]
        together = pa.concat_tables(dropped).sort_by("position")
        yield together.select(index.QUARANTINE_SCHEMA.names)


def write_quarantine(output: Path, run: Run) -> None:
    """Put `dropped_rows` into the data set, in place of those of an earlier run."""
    folder = output / QUARANTINE
    shutil.rmtree(folder, ignore_errors=True)
    parts = index.ParquetParts(folder, index.QUARANTINE_SCHEMA)
    for table in dropped_rows(run):
        parts.add_table(table)
    parts.close()


def stage_facts(results: Sequence[StageResult]) -> list[dict]:
    """Name, version and counts of every stage, for the manifest."""
    return [{"stage": r.name, "version": r.version, **r.counts, "notes": r.notes} for r in results[1:]]


def input_facts(run: Run, found: readers.Scan) -> list[dict]:
    """Every part of the input: where it comes from, and how many items it has; for the manifest."""
    return [
        {
            "part": task.name,
            "from": readers.describe(task),
            "items": run.store.finished(0, task.name).counts["kept"],
        }
        for task in found.tasks
    ]


def nothing_left(run: Run, counts: dict[str, Any]) -> str:
    """Why not one item was kept: the reasons with their numbers, and the first item."""
    reasons = {**counts["rejected"], **counts["quarantined"]}
    listed = ", ".join(f"{n} {r}" for r, n in sorted(reasons.items(), key=lambda p: -p[1]))
    first = next(table.slice(0, 1).to_pylist()[0] for table in dropped_rows(run) if len(table))
    return (
        f"none of {counts['seen']} items can be used ({listed}); first: {first['item']} ({first['detail']})"
    )
