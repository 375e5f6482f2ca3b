"""What lies in a finished data set: counts, checks, and samples by id, by words or by chance.

Reads the index part by part and the shards by position, so memory does not grow with the data set. Works on images and
on encoded data alike; the latter holds no pictures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from megatron_nucleus.data import images, index
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.data.manifest import read_manifest
from megatron_nucleus.data.shards import BLOCK_BYTES, ShardReader
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest
from megatron_nucleus.utils.files import sha256_file
from megatron_nucleus.utils.staging import check_writable

_ROWS_AT_ONCE = 16_384
_COUNTED = ("aspect_bucket", "tier", "episode_bucket", "licence", "source")
_NAMED_AT_MOST = 5  # damaged files that a message names
_MANY = 10_000  # different licences and the like that are counted apart
OTHERS = "(others)"
Progress = Callable[[int, int], None]


class Sample(NamedTuple):
    """A sample as it lies in its shard.

    row: of the index. name, payload: of the primary member. info: the parsed ``<id>.json``, {} without one.
    """

    row: dict[str, Any]
    name: str
    payload: bytes
    info: dict[str, Any]


class DataSet:
    """A finished data set folder.

    Attributes:
        root: the folder. manifest: parsed ``manifest.json``. encoded: whether it holds latents instead of images.
    """

    def __init__(self, root: str | Path):
        """Raises ConfigError or DataError when ``root`` is no finished data set."""
        self.root = Path(root)
        self.manifest, _ = read_manifest(root)
        self.encoded = self.manifest.get("encoded") is not None
        self._open: tuple[Path, int] | None = None
        try:
            self._parts = [(part["path"], part["rows"], part["sha256"]) for part in self.manifest["index"]]
            self._shards = [
                (shard["tar"], shard["bytes"], shard["sha256"]) for shard in self.manifest["shards"]
            ]
        except (KeyError, TypeError) as error:
            where = self.root / "manifest.json"
            raise DataError(f"{where}: damaged ({error!r} missing); copy the data set again") from error

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The index in order, some thousand rows at a time. columns: by default all."""
        for name, _, _ in self._parts:
            yield from index.iter_batches(self.root / name, index.INDEX_SCHEMA, _ROWS_AT_ONCE, columns)

    def counts(self) -> dict[str, Any]:
        """What the index says: samples by bucket, tier, episode bucket, licence and source, captions by length class
        and by source, scores by scorer, and clusters of duplicates. ``none`` stands for null."""
        found: dict[str, Counter] = {name: Counter() for name in _COUNTED}
        lengths, origins, scorers = Counter(), Counter(), Counter()
        samples = copies = clusters = 0
        for batch in self.batches([*_COUNTED, "captions", "scores", "duplicates"]):
            samples += len(batch)
            for name in _COUNTED:
                _add(found[name], batch[name])
            captions = pc.list_flatten(batch["captions"])
            _add(lengths, captions.field("length_class"))
            _add(origins, captions.field("source"))
            _add(scorers, pc.list_flatten(batch["scores"]).field("scorer"))
            others = pc.fill_null(pc.list_value_length(batch["duplicates"]), 0).to_numpy()
            copies += int(others.sum())
            clusters += int(np.count_nonzero(others))
        return {
            "samples": samples,
            **{name: _ordered(found[name]) for name in _COUNTED},
            **{name: dict(sorted(found[name].items())) for name in ("tier", "episode_bucket")},
            "captions": sum(lengths.values()),
            "caption_lengths": _ordered(lengths),
            "caption_sources": _ordered(origins),
            "scores": _ordered(scorers),
            "clusters": clusters,
            "copies": copies,
        }

    def check_members(self, progress: Progress = lambda done, total: None) -> int:
        """See that every row of the index points at a member of its id and length; returns how many do.

        Reads 512 bytes per row.

        Raises:
            DataError: the first one that does not, or an index that has another number of rows than the manifest says.
        """
        total, done = self.manifest["samples"], 0
        for batch in self.batches(["id", "tar", "offset", "length"]):
            for row in batch.to_pylist():
                self._check_member(row)
            done += len(batch)
            progress(done, total)
        self.close()
        if done != total:
            raise DataError(
                f"{self.root}: the index has {done} rows, the manifest says {total}; copy the data set again"
            )
        return done

    def _check_member(self, row: dict[str, Any]) -> None:
        try:
            member = self._member(row)
            found = (member.name.rsplit(".", 1)[0], member.size)
        except (tarfile.HeaderError, UnicodeDecodeError):
            found = None
        if found != (row["id"], row["length"]):
            raise DataError(
                f"{self.root / row['tar']}: the index says that sample {row['id']} of {row['length']} bytes is at byte "
                f"{row['offset']}; it is not: shard and index do not belong together, or one is damaged; copy the data "
                "set again"
            )

    def _member(self, row: dict[str, Any]) -> tarfile.TarInfo:
        """Header of the primary member of a row."""
        path = self.root / row["tar"]
        if (
            self._open is None or self._open[0] != path
        ):  # rows come shard by shard, so one open file is enough
            self.close()
            try:
                self._open = (path, os.open(path, os.O_RDONLY))
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error.strerror}); copy the data set again"
                ) from error
        header = os.pread(self._open[1], BLOCK_BYTES, max(row["offset"] - BLOCK_BYTES, 0))
        return tarfile.TarInfo.frombuf(header, "ascii", "strict")

    def close(self) -> None:
        """Close the shard that is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def verify(self, progress: Progress = lambda done, total: None) -> int:
        """Read all files of the manifest and compare their SHA-256; returns the bytes read.

        progress: called with (bytes done, bytes in all) after every file.

        Raises:
            DataError: files that are missing or damaged, by name.
        """
        listed = [(tar, digest) for tar, _, digest in self._shards] + [
            (path, digest) for path, _, digest in self._parts
        ]
        total = sum((self.root / name).stat().st_size for name, _ in listed if (self.root / name).is_file())
        done, damaged = 0, []
        for name, digest in listed:
            path = self.root / name
            if not path.is_file():
                damaged.append(f"{name} is missing")
                continue
            if sha256_file(path) != digest:
                damaged.append(f"{name} is not what the manifest says (SHA-256)")
            done += path.stat().st_size
            progress(done, total)
        if damaged:
            more = f", and {len(damaged) - _NAMED_AT_MOST} more" if len(damaged) > _NAMED_AT_MOST else ""
            raise DataError(f"{self.root}: {', '.join(damaged[:_NAMED_AT_MOST])}{more}; copy these again")
        return done

    def by_id(self, wanted: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows whose id begins with ``wanted``, in any case, or whose place in the input ends with it (`_named`), in
        the order of the index: at most ``limit``, and how many there are.

        Raises:
            ConfigError: an empty text.
        """
        _check_wanted(wanted)
        rows, number = [], 0
        for batch in self.batches():
            chosen = _named(batch["id"], batch["source_id"], wanted)
            number += (hits := pc.sum(chosen).as_py() or 0)
            if hits:
                rows += batch.filter(chosen).slice(0, max(limit - len(rows), 0)).to_pylist()
        return rows, number

    def not_kept(self, wanted: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows of the quarantine, chosen and counted as by `by_id`."""
        _check_wanted(wanted)
        rows, number = [], 0
        for path in sorted((self.root / "quarantine").glob("*.parquet")):
            for batch in index.iter_batches(path, index.QUARANTINE_SCHEMA, _ROWS_AT_ONCE):
                chosen = _named(batch["sha256"], batch["item"], wanted)
                number += (hits := pc.sum(chosen).as_py() or 0)
                if hits:
                    rows += batch.filter(chosen).slice(0, max(limit - len(rows), 0)).to_pylist()
        return rows, number

    def nearest_id(self, wanted: str) -> str:
        """The id of the index that shares the longest beginning with ``wanted``; empty where none shares any."""
        closest = _Closest(wanted.strip().lower())
        for batch in self.batches(["id"]):
            closest.add(batch["id"].to_pylist())
        return closest.best

    def by_text(self, words: Sequence[str], limit: int) -> tuple[list[dict[str, Any]], int]:
        """Rows of which one caption has all the words, in any case and order: at most ``limit``, and how many in all.

        A word is any part of the text.
        """
        if not words or not all(word.strip() for word in words):
            raise ConfigError("--text: no word, which is in every caption; give one or more")
        rows, number = [], 0
        for batch in self.batches():
            texts = pc.list_flatten(batch["captions"]).field("text")
            hit = np.ones(len(texts), bool)
            for word in words:
                found = pc.match_substring(texts, word.strip(), ignore_case=True)
                hit &= pc.fill_null(found, False).to_numpy(zero_copy_only=False)
            owners = np.unique(pc.list_parent_indices(batch["captions"]).to_numpy()[hit])
            number += len(owners)
            rows += batch.take(pa.array(owners[: max(limit - len(rows), 0)], pa.int64())).to_pylist()
        return rows, number

    def draw(
        self,
        count: int,
        seed: int,
        bucket: str | None = None,
        tier: str | None = None,
        episode: str | None = None,
    ) -> list[dict[str, Any]]:
        """``count`` rows by chance, the same for the same seed in any order of the data set.

        Raises:
            ConfigError: an unknown bucket, tier or episode bucket, or one without samples.
        """
        self._check_names(bucket, tier, episode)
        best: list[tuple[bytes, str]] = []
        for batch in self.batches(["id", "aspect_bucket", "tier", "episode_bucket"]):
            chosen = _equal(batch, aspect_bucket=bucket, tier=tier, episode_bucket=episode)
            keys = [(_key(seed, name), name) for name in batch.filter(chosen)["id"].to_pylist()]
            best = sorted([*best, *keys])[:count]
        if not best:
            given = {"--bucket": bucket, "--tier": tier, "--episode": episode}
            said = " ".join(f"{flag} {value}" for flag, value in given.items() if value) or "it"
            raise ConfigError(f"{said}: {self.root} has no such sample")
        place = {name: n for n, (_, name) in enumerate(best)}
        rows = []
        for batch in self.batches():
            chosen = pc.is_in(batch["id"], value_set=pa.array(list(place)))
            rows += batch.filter(chosen).to_pylist()
        return sorted(rows, key=lambda row: place[row["id"]])

    def _check_names(self, bucket: str | None, tier: str | None, episode: str | None) -> None:
        known = {"--bucket": tuple(self.manifest["buckets"]), "--tier": TIERS, "--episode": EPISODE_BUCKETS}
        for (flag, names), value in zip(known.items(), (bucket, tier, episode), strict=True):
            if value is not None and value not in names:
                raise ConfigError(
                    f"{flag} {value}: unknown{nearest(value, names)}; one of {', '.join(names)}"
                )

    def samples(self, rows: Sequence[dict[str, Any]]) -> Iterator[Sample]:
        """Content of some rows, in their order.

        Raises:
            DataError: one does not lie where the index says.
        """
        reader = ShardReader(self.root)
        try:
            for row in rows:
                payload, info = reader.read_sample(row["tar"], row["offset"], row["length"], row["id"])
                yield Sample(row, self._member(row).name, payload, info)
        finally:
            reader.close()

    def picture(self, sample: Sample, side_px: int) -> Image.Image:
        """The picture in RGB, upright; a JPEG may come at a fraction of its size, no side below ``side_px``.

        Raises:
            ConfigError: the data set holds latents. DataError: the image no longer decodes.
        """
        if self.encoded:
            raise ConfigError(
                f"{self.root}: an encoded data set holds latents and no pictures; give the data set it was encoded from"
            )
        try:
            with images.quiet_decoding():
                return images.decode(sample.payload, images.PILLOW_MAX_PIXELS, (side_px, side_px)).image
        except images.UnusableImage as error:
            raise DataError(
                f"{self.root}: sample {sample.row['id']}: {error}; copy the data set again"
            ) from error


def extract(sample: Sample, folder: Path) -> list[Path]:
    """Write the original bytes under the name they have in the shard, and ``<id>.json`` where there is one.

    Raises:
        ConfigError: ``folder`` is a file or cannot be written, or a file of that name with other content is there.
    """
    check_writable(folder, "--extract")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / sample.name: sample.payload}
    if sample.info:
        text = json.dumps(sample.info, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        files[folder / f"{sample.row['id']}.json"] = text.encode()
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content:
            raise ConfigError(
                f"--extract {folder}: {path.name} is there with other content; choose another folder"
            )
        path.write_bytes(content)
    return list(files)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the index as JSON values: hashes as hexadecimal digits, versions as an object."""
    out = {name: value.hex() if isinstance(value, bytes) else value for name, value in row.items()}
    out["stage_versions"] = dict(row["stage_versions"] or [])
    return out


def _check_wanted(wanted: str) -> None:
    if not wanted.strip():
        raise ConfigError("--id: give the beginning of an id, or a file's name or path in the input")


def _named(ids: pa.Array, places: pa.Array, wanted: str) -> pa.Array:
    """bool, no nulls: the id begins with ``wanted``, in any case, or the place is ``wanted`` or ends with it after a
    slash (``b.jpg`` is ``a/b.jpg``, and no ``ab.jpg``)."""
    wanted = wanted.strip()
    hits = (
        pc.starts_with(ids, wanted.lower()),
        pc.equal(places, wanted),
        pc.ends_with(places, "/" + wanted.lstrip("/")),
    )
    first, *others = (pc.fill_null(hit, False) for hit in hits)
    return functools.reduce(pc.or_, others, first)


class _Closest:
    """The id that shares the longest beginning with what was asked for, if any does; of equals the smallest."""

    def __init__(self, wanted: str):
        self._wanted, self.best, self._shared = wanted, "", 0

    def add(self, ids: Sequence[str]) -> None:
        for name in ids:
            pairs = zip(self._wanted, name, strict=False)
            shared = next(
                (at for at, (a, b) in enumerate(pairs) if a != b), min(len(self._wanted), len(name))
            )
            if shared and (not self.best or (-shared, name) < (-self._shared, self.best)):
                self.best, self._shared = name, shared


def _key(seed: int, sample_id: str) -> bytes:
    return hashlib.sha256(f"{seed} {sample_id}".encode()).digest()


def _equal(batch: pa.RecordBatch, **wanted: str | None) -> pa.Array:
    chosen = pa.array(np.ones(len(batch), bool))
    for name, value in wanted.items():
        if value is not None:
            chosen = pc.and_(chosen, pc.fill_null(pc.equal(batch[name], value), False))
    return chosen


def _add(counter: Counter, values: pa.Array) -> None:
    for entry in pc.value_counts(values).to_pylist():
        name = "none" if entry["values"] is None else entry["values"]
        counter[name if name in counter or len(counter) < _MANY else OTHERS] += entry["counts"]


def _ordered(counter: Counter) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda pair: (-pair[1], pair[0])))
