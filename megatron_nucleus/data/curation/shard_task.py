"""One shard: original bytes into a tar, and the index rows that say where they lie; what a worker does.

A shard is made like a part of a stage: under another name, then renamed, with a ``_SUCCESS.json``; it is not made again
while the tar is there and all that goes into it is the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from megatron_nucleus.data import index, shards
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS, PayloadSource
from megatron_nucleus.data.curation.store import ROWS, SUCCESS, Store
from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import sha256_file, write_json_atomic

_NEEDED = (
    *REFERENCE_COLUMNS,
    *("id", "extension", "width_px", "height_px", "exif_orientation", "source_url", "licence", "attribution"),
    *("captions", "tier", "episode_bucket", "metadata", "scores", "duplicates", "duplicate_cluster"),
)
_OPTIONAL = ("phash", "phash_impl")


class InputChanged(DataError):
    """An input file of a part is no longer what was inspected."""

    def __init__(self, message: str, part: str):
        super().__init__(message)
        self.part = part

    def __reduce__(self) -> tuple:
        return InputChanged, (str(self), self.part)


class ShardTask(NamedTuple):
    """One shard to write. pieces: (part, positions) in order. level: of the last stage.

    versions: stage name -> version, stored with every row. entry: hash of all that goes in.
    """

    name: str
    bucket: str
    store: Store
    level: int
    folder: str
    output: str
    pieces: tuple[tuple[str, np.ndarray], ...]
    source: PayloadSource
    collection: str
    versions: dict[str, str]
    entry: str


class Packed(NamedTuple):
    """What is known of a finished shard. captions, sources: numbers by length class and by origin."""

    entry: str
    shard: shards.ShardInfo
    captions: dict[str, int]
    sources: dict[str, int]


def finished(task: ShardTask) -> Packed | None:
    """What an earlier run made of the shard, None when it must be made."""
    path = Path(task.folder) / task.name / SUCCESS
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        packed = Packed(**{**value, "shard": shards.ShardInfo(*value["shard"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and run again") from error
    tar = Path(task.output) / packed.shard.tar
    if packed.entry != task.entry or not tar.is_file() or tar.stat().st_size != packed.shard.bytes:
        return None
    return packed if sha256_file(tar) == packed.shard.sha256 else None


def make_shard(task: ShardTask) -> Packed:
    """The shard of a task, written unless it is there already, whole; called in a worker."""
    return finished(task) or write_shard(task)


def write_shard(task: ShardTask) -> Packed:
    """Write one shard and the table of its index rows.

    Raises:
        InputChanged: an input file is no longer what was inspected.
    """
    shard = shards.ShardFile(task.output, f"shards/{task.name}.tar", task.bucket)
    rows = []
    try:
        for part, row in _rows(task):
            payload = _read_again(task.source, row, part)
            info = _sample_info(row, task.collection)
            location = shard.add(row["id"], {row["extension"]: payload, "json": shards.encode_json(info)})
            rows.append(_index_row(row, location, task))
    except BaseException:
        shard.abort()
        raise
    captions = [c for row in rows for c in row["captions"]]
    packed = Packed(
        task.entry,
        shard.close(),
        dict(sorted(Counter(c["length_class"] for c in captions).items())),
        dict(sorted(Counter(c["source"] for c in captions).items())),
    )
    _record(task, pa.Table.from_pylist(rows, schema=index.tagged(index.INDEX_SCHEMA)), packed)
    return packed


def _record(task: ShardTask, rows: pa.Table, packed: Packed) -> None:
    final = Path(task.folder) / task.name
    temporary = final.with_name(f".{task.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index.write_table(rows, temporary / ROWS)
    write_json_atomic(temporary / SUCCESS, {**packed._asdict(), "shard": list(packed.shard)})
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)


def _rows(task: ShardTask) -> Iterator[tuple[str, dict]]:
    """(part, row) of a shard in order, one part's in memory at a time."""
    known = {name for level in task.store.levels for name in level.columns}
    columns = [*_NEEDED, *(name for name in _OPTIONAL if name in known)]
    for part, positions in task.pieces:
        for row in task.store.read(task.level, part, columns, positions).to_pylist():
            yield part, row


def _read_again(source: PayloadSource, row: dict, part: str) -> bytes:
    try:
        payload = source.read(row)
    except UnusableImage as error:
        raise InputChanged(
            f"{source.root}: {row['item']} can no longer be read ({error.detail}); run again", part
        ) from error
    if hashlib.sha256(payload).hexdigest() != row["id"]:
        raise InputChanged(
            f"{source.root}: {row['item']} changed while it was being curated; run again", part
        )
    return payload


def _sample_info(row: dict, collection: str) -> dict:
    """Content of ``<id>.json``."""
    info = {
        "id": row["id"],
        "source": collection,
        "source_id": row["item"],
        **{name: row[name] for name in ("source_url", "licence", "attribution")},
        **{name: row[name] for name in ("width_px", "height_px", "exif_orientation")},
        "captions": [{k: v for k, v in c.items() if v is not None} for c in row["captions"]],
    }
    info |= {name: row[name] for name in ("tier", "episode_bucket") if row[name] is not None}
    info |= {name: row[name] for name in ("scores", "duplicates") if row[name]}
    if row["metadata"]:
        info["metadata"] = json.loads(row["metadata"])
    return info


def _index_row(row: dict, location: shards.Location, task: ShardTask) -> dict:
    phash = row.get("phash")
    return {
        "id": row["id"],
        "source_id": row["item"],
        "source": task.collection,
        "tar": location.tar,
        "offset": location.offset,
        "length": location.length,
        **{name: row[name] for name in ("source_url", "licence", "attribution")},
        **{name: row[name] for name in ("width_px", "height_px", "exif_orientation")},
        "aspect_bucket": task.bucket,
        "tier": row["tier"],
        "episode_bucket": row["episode_bucket"],
        "partition_key": index.partition_key(row["id"]),
        "captions": row["captions"],
        "scores": row["scores"],
        "phash": None if phash is None else int(phash).to_bytes(8, "big"),
        "phash_impl": row.get("phash_impl"),
        "duplicates": row["duplicates"],
        "duplicate_cluster": row["duplicate_cluster"],
        "duplicate_keep": True,
        "stage_versions": task.versions,
    }


def version() -> str:
    """Hash of the code that decides what a shard looks like."""
    modules = (sys.modules[__name__], shards, index)
    return hashlib.sha256("\0".join(inspect.getsource(m) for m in modules).encode()).hexdigest()[:16]
