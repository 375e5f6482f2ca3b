"""The end of curation: which image goes into which shard, the shards themselves, and the index of all of them.

One aspect bucket per shard, images in the order of the input. The plan depends on nothing but the rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_nucleus.data import buckets, index, shards
from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.runner import Run
from megatron_nucleus.data.curation.settings import CurationConfig
from megatron_nucleus.data.curation.shard_task import Packed, ShardTask, make_shard, version
from megatron_nucleus.data.curation.store import Store
from megatron_nucleus.utils.errors import ConfigError, DataError

PACK = "pack"
_JSON_ESTIMATE_BYTES = 1024  # only to decide where a shard ends


class Kept(NamedTuple):
    """The rows to pack, as columns of equal length in input order.

    part: number of the part; position: in it. width_px, height_px as displayed. length: bytes of the file.
    """

    part: np.ndarray
    position: np.ndarray
    width_px: np.ndarray
    height_px: np.ndarray
    length: np.ndarray


def load_kept(store: Store, level: int, parts: Sequence[str]) -> Kept:
    """The columns that planning needs, of all rows that are alive after the last stage."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Kept._fields}
    for number, part in enumerate(parts):
        table = store.read(level, part, ["width_px", "height_px", "length"])
        columns["part"].append(np.full(len(table), number, np.int32))
        for name in Kept._fields[1:]:
            columns[name].append(table[name].to_numpy())
    return Kept(*(np.concatenate(columns[name]) for name in Kept._fields))


def check_keys(store: Store, level: int, parts: Sequence[str]) -> None:
    """A data set holds a key once: readers of WebDataset tars take neighbours of one key for one sample.

    Memory: 16 bytes per image, the beginnings of the ids.

    Raises:
        ConfigError: the same bytes are kept twice, which a recipe with ``exact_duplicates`` rules out.
    """
    if any(stage.name == "exact_duplicates" for stage in store.levels[: level + 1]):
        return
    ids = [store.read(level, part, ["id"])["id"] for part in parts]
    starts = np.sort(
        np.concatenate([pc.utf8_slice_codeunits(i, 0, 16).to_numpy().astype("S16") for i in ids])
    )
    repeated = starts[1:][starts[1:] == starts[:-1]]
    if len(repeated):
        raise ConfigError(
            f"recipe.stages: {len(repeated)} images are kept twice, byte for byte (id {repeated[0].decode()}...), "
            "and a data set holds a key once; add exact_duplicates to the recipe"
        )


def assign_buckets(kept: Kept, min_images: int) -> tuple[np.ndarray, dict[str, str]]:
    """Bucket number (in `buckets.BUCKETS`) of every row, after merging small buckets.

    Also returns ``{small bucket: bucket that took its images}``.
    """
    sizes, inverse = np.unique(np.stack([kept.width_px, kept.height_px], axis=1), axis=0, return_inverse=True)
    numbers = np.array([buckets.BUCKETS.index(buckets.assign(int(w), int(h))) for w, h in sizes], np.int64)
    assigned = numbers[inverse.reshape(-1)]
    counts = np.bincount(assigned, minlength=len(buckets.BUCKETS))
    final = buckets.merge_small(dict(zip(buckets.BUCKETS, counts.tolist(), strict=True)), min_images)
    table = np.array([buckets.BUCKETS.index(final.get(b, b)) for b in buckets.BUCKETS])
    return table[assigned], {b: f for b, f in final.items() if b != f}


def plan_shards(kept: Kept, assigned: np.ndarray, max_bytes: int) -> list[tuple[str, np.ndarray]]:
    """(shard name, row numbers) in bucket order, rows in input order; depends on nothing but the rows."""
    plan = []
    for number, bucket in sorted(enumerate(buckets.BUCKETS), key=lambda pair: pair[1]):
        rows = np.flatnonzero(assigned == number)
        block = shards.BLOCK_BYTES
        lengths = -(-kept.length[rows] // block) * block + 2 * block + _JSON_ESTIMATE_BYTES
        start, size, pieces = 0, 0, []
        for i, length in enumerate(lengths.tolist()):
            if size and size + length > max_bytes:
                pieces.append(rows[start:i])
                start, size = i, 0
            size += length
        if len(rows):
            pieces.append(rows[start:])
        plan += [(shards.shard_name(bucket, i), piece) for i, piece in enumerate(pieces)]
    return plan


def pieces_of(kept: Kept, rows: np.ndarray, parts: Sequence[str]) -> tuple[tuple[str, np.ndarray], ...]:
    """(part, positions) of some rows, in their order."""
    numbers = kept.part[rows]
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    return tuple(
        (parts[int(numbers[low])], kept.position[rows[low:high]]) for low, high in itertools.pairwise(edges)
    )


def entry_of(pieces: Sequence[tuple[str, np.ndarray]], facts: Any, results: dict[str, str]) -> str:
    """Hash of what goes into a shard: its rows, the chain hashes of their parts, and ``facts`` (settings, versions)."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part, positions in pieces:
        digest.update(f"{part} {results[part]} ".encode())
        digest.update(np.ascontiguousarray(positions, np.int32).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """The shards of a data set. tables: of their index rows. moved: small bucket -> bucket that took its images."""

    shards: list[Packed]
    tables: list[Path]
    moved: dict[str, str]


def pack_all(
    output: Path,
    run: Run,
    config: CurationConfig,
    versions: Mapping[str, str],
    progress: Callable[[int], Any] = lambda images: None,
) -> PackedSet:
    """Bring all shards of a data set up to date.

    versions: stage name -> version, stored with every row. progress: called with the images of each shard.

    Raises:
        InputChanged: an input file is no longer what was inspected.
        DataError: a worker was lost.
        ConfigError: an image is kept twice.
    """
    check_keys(run.store, len(run.store.levels) - 1, run.parts)
    folder = Path(run.store.work) / f"{len(run.store.levels):02d}-{PACK}"
    folder.mkdir(exist_ok=True)
    kept = load_kept(run.store, len(run.store.levels) - 1, run.parts)
    assigned, moved = assign_buckets(kept, config.min_bucket_images)
    tasks = _tasks(output, folder, run, config, {**versions, PACK: version()}, kept, assigned)
    _clear_shards(output / "shards", folder, {task.name for task in tasks})
    done = {}
    for task, result in run.engine.map(make_shard, tasks):
        if isinstance(result, WorkerDied):
            raise DataError(f"packing {task.name}: a worker was lost ({result.detail}); run again")
        done[task.name] = result
        progress(result.shard.samples)
    rows = [folder / task.name / tables.ROWS for task in tasks]
    return PackedSet([done[task.name] for task in tasks], rows, moved)


def _tasks(
    output: Path,
    folder: Path,
    run: Run,
    config: CurationConfig,
    versions: dict[str, str],
    kept: Kept,
    assigned: np.ndarray,
) -> list[ShardTask]:
    level = len(run.store.levels) - 1
    results = {part: run.store.finished(level, part).result for part in run.parts}
    tasks = []
    for tar, rows in plan_shards(kept, assigned, config.max_shard_bytes):
        pieces = pieces_of(kept, rows, run.parts)
        bucket = buckets.BUCKETS[int(assigned[rows[0]])]
        tasks.append(
            ShardTask(
                name=Path(tar).stem,
                bucket=bucket,
                store=run.store,
                level=level,
                folder=str(folder),
                output=str(output),
                pieces=pieces,
                source=run.source,
                collection=config.source,
                versions=versions,
                entry=entry_of(pieces, [tar, bucket, config.source, versions], results),
            )
        )
    return tasks


def _clear_shards(shards_folder: Path, folder: Path, wanted: set[str]) -> None:
    """Remove shards of an earlier plan, and what killed processes left."""
    for path in shards_folder.glob("*"):
        if path.name.removesuffix(".tar") not in wanted:
            path.unlink()
    for path in folder.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path)


def write_index(output: Path, packed: PackedSet) -> list[dict]:
    """The Parquet index of all shards, as `index.ParquetParts.close` describes it."""
    shutil.rmtree(output / "index", ignore_errors=True)
    parts = index.ParquetParts(output / "index", index.INDEX_SCHEMA)
    for path in packed.tables:
        parts.add_table(pq.read_table(path, partitioning=None))
    return parts.close()
