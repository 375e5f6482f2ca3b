"""Exact duplicates: of all files with the same bytes one is kept, and the captions of the others go to it.

Which one: licence known before unknown, more captions before fewer, then input order. Only decision columns are
in memory (about 70 bytes per image); bytes are never deleted.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from megatron_nucleus.data.curation.captions import merge_captions
from megatron_nucleus.data.index import caption_dict
from megatron_nucleus.types import Caption


class Decisions(NamedTuple):
    """Usable items of all tasks, as columns of equal length in input order.

    id: S32 (raw sha256). task, row: the row of task number ``task``'s table. cluster: equal for equal bytes.
    keep: one True per cluster.
    """

    id: np.ndarray
    task: np.ndarray
    row: np.ndarray
    width_px: np.ndarray
    height_px: np.ndarray
    length: np.ndarray
    cluster: np.ndarray
    keep: np.ndarray


def decide(folder: Path, task_names: list[str]) -> Decisions:
    """Read the decision columns of the inspected tasks and choose what to keep."""
    columns: dict[str, list[np.ndarray]] = {}
    for number, name in enumerate(task_names):
        table = pq.read_table(
            folder / f"{name}.parquet",
            columns=["id", "width_px", "height_px", "length", "licence", "captions"],
            partitioning=None,
        )
        raw = bytes.fromhex("".join(table["id"].to_pylist()))
        values = {
            "id": np.frombuffer(raw, "V32"),
            "task": np.full(len(table), number, np.int32),
            "row": np.arange(len(table), dtype=np.int32),
            "width_px": table["width_px"].to_numpy(),
            "height_px": table["height_px"].to_numpy(),
            "length": table["length"].to_numpy(),
            "licensed": np.array([x != "unknown" for x in table["licence"].to_pylist()], bool),
            "captions": np.array([len(c) for c in table["captions"]], np.int32),
        }
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    _, cluster = np.unique(joined["id"], return_inverse=True)
    order = np.lexsort((joined["row"], joined["task"], -joined["captions"], ~joined["licensed"], cluster))
    first = np.ones(len(order), bool)
    first[1:] = cluster[order][1:] != cluster[order][:-1]
    keep = np.zeros(len(order), bool)
    keep[order[first]] = True
    names = ("id", "task", "row", "width_px", "height_px", "length")
    return Decisions(*(joined[n] for n in names), cluster=cluster, keep=keep)


def duplicate_groups(decisions: Decisions) -> list[tuple[int, list[int]]]:
    """(kept position, positions of its duplicates) of every cluster with more than one member, in input order."""
    sizes = np.bincount(decisions.cluster)
    members = np.flatnonzero(sizes[decisions.cluster] > 1)
    groups: dict[int, list[int]] = {}
    for position in members.tolist():
        groups.setdefault(int(decisions.cluster[position]), []).append(position)
    return [
        (next(p for p in group if decisions.keep[p]), [p for p in group if not decisions.keep[p]])
        for group in groups.values()
    ]


def merge_duplicates(
    folder: Path, task_names: list[str], decisions: Decisions
) -> tuple[dict[int, dict], list[dict]]:
    """What kept images take over from their duplicates, and a quarantine row for each duplicate.

    Returns ``{kept position: {"captions": [...], "duplicates": [{source_id, source_url, licence}]}}`` and rows.
    """
    groups = duplicate_groups(decisions)
    wanted = sorted({p for kept, rest in groups for p in (kept, *rest)})
    rows = _read_rows(folder, task_names, decisions, wanted)
    merged, dropped = {}, []
    for kept, rest in groups:
        members = [rows[p] for p in (kept, *rest)]
        captions = [[Caption(**c) for c in row["captions"]] for row in members]
        merged[kept] = {
            **{name: _first_given(members, name) for name in ("tier", "episode_bucket")},
            "captions": [caption_dict(c) for c in merge_captions(*captions)],
            "duplicates": [
                {
                    "source_id": rows[p]["item"],
                    "source_url": rows[p]["source_url"],
                    "licence": rows[p]["licence"],
                }
                for p in rest
            ],
        }
        dropped += [_duplicate_row(rows[p], rows[kept]["item"]) for p in rest]
    return merged, dropped


def _first_given(rows: list[dict], name: str) -> str | None:
    """The value of the first row that has one."""
    return next((row[name] for row in rows if row[name] is not None), None)


def _read_rows(
    folder: Path, task_names: list[str], decisions: Decisions, positions: list[int]
) -> dict[int, dict]:
    rows: dict[int, dict] = {}
    by_task: dict[int, list[int]] = {}
    for position in positions:
        by_task.setdefault(int(decisions.task[position]), []).append(position)
    for task, members in by_task.items():
        table = pq.read_table(folder / f"{task_names[task]}.parquet", partitioning=None)
        picked = table.take(decisions.row[members]).to_pylist()
        rows.update(zip(members, picked, strict=True))
    return rows


def _duplicate_row(row: dict, kept_item: str) -> dict:
    return {
        "item": row["item"],
        "verdict": "rejected",
        "reason": "exact_duplicate",
        "detail": f"same bytes as {kept_item}",
        "stage": "dedup",
        "container": row["container"],
        "offset": row["offset"],
        "length": row["length"],
        "width_px": row["width_px"],
        "height_px": row["height_px"],
        "sha256": row["id"],
    }
