"""Last stage: original bytes into shards, one aspect bucket per shard, and the index rows that say where they lie."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nucleus.data import buckets, index, shards
from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation.dedup import Decisions
from megatron_nucleus.data.curation.filters import CurationConfig
from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.utils.errors import DataError

_JSON_ESTIMATE_BYTES = 1024  # only to decide where a shard ends


class PackTask(NamedTuple):
    """One shard to write. position: of each sample among all inspected ones; task, row: where its row lies.

    merged: position -> captions and provenance taken over from duplicates.
    """

    name: str
    bucket: str
    input_root: str
    output_root: str
    inspected: str
    task_names: tuple[str, ...]
    task: np.ndarray
    row: np.ndarray
    merged: dict[tuple[int, int], dict]
    stage_versions: dict[str, str]


class InputChanged(DataError):
    """An input file is no longer what was inspected."""


def assign_buckets(decisions: Decisions, min_images: int) -> tuple[np.ndarray, dict[str, str]]:
    """Bucket number (in `buckets.BUCKETS`, -1 where not kept) of every position, after merging small buckets.

    Also returns ``{small bucket: bucket that took its images}``.
    """
    sizes, inverse = np.unique(
        np.stack([decisions.width_px, decisions.height_px], axis=1), axis=0, return_inverse=True
    )
    numbers = np.array([buckets.BUCKETS.index(buckets.assign(int(w), int(h))) for w, h in sizes], np.int64)
    assigned = numbers[inverse.reshape(-1)]
    counts = np.bincount(assigned[decisions.keep], minlength=len(buckets.BUCKETS))
    final = buckets.merge_small(dict(zip(buckets.BUCKETS, counts.tolist(), strict=True)), min_images)
    table = np.array([buckets.BUCKETS.index(final.get(b, b)) for b in buckets.BUCKETS])
    assigned = np.where(decisions.keep, table[assigned], -1)
    return assigned, {b: f for b, f in final.items() if b != f}


def plan_shards(decisions: Decisions, assigned: np.ndarray, max_bytes: int) -> list[tuple[str, np.ndarray]]:
    """(shard name, positions) in bucket order, samples in input order; depends on nothing but the decisions."""
    plan = []
    for number, bucket in sorted(enumerate(buckets.BUCKETS), key=lambda pair: pair[1]):
        positions = np.flatnonzero(assigned == number)
        block = shards.BLOCK_BYTES
        lengths = -(-decisions.length[positions] // block) * block + 2 * block + _JSON_ESTIMATE_BYTES
        start, size, parts = 0, 0, []
        for i, length in enumerate(lengths.tolist()):
            if size and size + length > max_bytes:
                parts.append(positions[start:i])
                start, size = i, 0
            size += length
        if len(positions):
            parts.append(positions[start:])
        plan += [(shards.shard_name(bucket, i), part) for i, part in enumerate(parts)]
    return plan


def pack_task(
    task: PackTask,
    config: CurationConfig,
    folder: Path,
    skip: frozenset[int],
    started: Callable[[int], object],
) -> dict:
    """Write one shard and ``<task>.parquet`` with its index rows.

    Besides the counts of the stage contract: ``shard`` (a `ShardInfo`), ``captions`` and ``sources`` (numbers).

    Raises:
        InputChanged: an input file is no longer what was inspected.
    """
    shard = shards.ShardFile(task.output_root, f"shards/{task.name}.tar", task.bucket)
    rows = []
    try:
        for number, (place, row) in enumerate(_rows(task)):
            started(number)
            row.update(task.merged.get(place, {}))
            payload = _read_again(task.input_root, row, config)
            info = _sample_info(row, config)
            location = shard.add(row["id"], {row["extension"]: payload, "json": shards.encode_json(info)})
            rows.append(_index_row(row, location, task, config))
    except BaseException:
        shard.abort()
        raise
    done = shard.close()
    schema = index.tagged(index.INDEX_SCHEMA)
    index.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{task.name}.parquet")
    captions = [c for row in rows for c in row["captions"]]
    return {
        "in": len(rows),
        "kept": len(rows),
        "rejected": {},
        "quarantined": {},
        "shard": list(done),
        "captions": dict(sorted(Counter(c["length_class"] for c in captions).items())),
        "sources": dict(sorted(Counter(c["source"] for c in captions).items())),
    }


def _rows(task: PackTask) -> Iterator[tuple[tuple[int, int], dict]]:
    """((task, row), inspected row) of every sample in order, one table in memory at a time."""
    edges = [0, *(np.flatnonzero(np.diff(task.task)) + 1).tolist(), len(task.task)]
    for low, high in itertools.pairwise(edges):
        number = int(task.task[low])
        table = pq.read_table(Path(task.inspected) / f"{task.task_names[number]}.parquet", partitioning=None)
        rows = task.row[low:high]
        for place, row in zip(rows.tolist(), table.take(rows).to_pylist(), strict=True):
            yield (number, place), row


def _read_again(root: str, row: dict, config: CurationConfig) -> bytes:
    reference = readers.Reference(row["container"], row["offset"], row["length"])
    try:
        payload = readers.read_reference(root, reference, config.max_file_bytes)
    except UnusableImage as error:
        raise InputChanged(
            f"{root}: {row['item']} can no longer be read ({error.detail}); run again"
        ) from error
    if hashlib.sha256(payload).hexdigest() != row["id"]:
        raise InputChanged(f"{root}: {row['item']} changed while it was being curated; run again")
    return payload


def _sample_info(row: dict, config: CurationConfig) -> dict:
    """Content of ``<id>.json``."""
    info = {
        "id": row["id"],
        "source": config.source,
        "source_id": row["item"],
        "source_url": row["source_url"],
        "licence": row["licence"],
        "attribution": row["attribution"],
        "width_px": row["width_px"],
        "height_px": row["height_px"],
        "exif_orientation": row["exif_orientation"],
        "captions": [{k: v for k, v in c.items() if v is not None} for c in row["captions"]],
    }
    info |= {name: row[name] for name in ("tier", "episode_bucket") if row[name] is not None}
    if row.get("duplicates"):
        info["duplicates"] = row["duplicates"]
    if row["metadata"]:
        info["metadata"] = json.loads(row["metadata"])
    return info


def _index_row(row: dict, location: shards.Location, task: PackTask, config: CurationConfig) -> dict:
    return {
        "id": row["id"],
        "source_id": row["item"],
        "source": config.source,
        "source_url": row["source_url"],
        "licence": row["licence"],
        "attribution": row["attribution"],
        "tar": location.tar,
        "offset": location.offset,
        "length": location.length,
        "width_px": row["width_px"],
        "height_px": row["height_px"],
        "exif_orientation": row["exif_orientation"],
        "aspect_bucket": task.bucket,
        "tier": row["tier"],
        "episode_bucket": row["episode_bucket"],
        "partition_key": index.partition_key(row["id"]),
        "captions": row["captions"],
        "scores": [],
        "duplicate_cluster": row["id"] if row.get("duplicates") else None,
        "duplicate_keep": True,
        "stage_versions": task.stage_versions,
    }
