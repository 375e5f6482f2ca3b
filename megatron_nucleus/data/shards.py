"""Shards: uncompressed WebDataset tars that hold original bytes, written once and read by position.

A sample is a run of adjacent members that share one key: ``<key>.<ext>`` (the *primary* member, written
first) and usually ``<key>.json``. Keys are ASCII without a dot. Headers carry no time, owner or other trace
of the machine, so equal samples give equal bytes. Any WebDataset reader opens these files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from megatron_nucleus.utils.errors import DataError

BLOCK_BYTES = tarfile.BLOCKSIZE  # 512
MAX_SHARD_BYTES = 512 << 20  # 256 MB to 1 GB is the field's habit: long sequential reads, cheap to copy again
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")
_EXTENSION = re.compile(r"[A-Za-z0-9_]{1,16}")
_JSON_OVERREAD_BYTES = 4096  # most sample JSONs fit, so payload and JSON come with one read


class Location(NamedTuple):
    """Where a sample lies.

    tar: path relative to the data set folder. offset, length: the primary member's payload, in bytes.
    members: extension -> (offset, length) of every member's payload.
    """

    tar: str
    offset: int
    length: int
    members: dict[str, tuple[int, int]]


class ShardInfo(NamedTuple):
    """One finished shard: path relative to the data set folder, size, checksum and contents."""

    tar: str
    bytes: int
    sha256: str
    samples: int
    bucket: str


def padded(length: int) -> int:
    """Bytes a payload of ``length`` occupies in a tar: rounded up to whole 512-byte blocks."""
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def sample_bytes(lengths: list[int]) -> int:
    """Bytes that a sample with members of these lengths occupies, headers included."""
    return sum(BLOCK_BYTES + padded(n) for n in lengths)


def member_header(name: str, length: int) -> bytes:
    """The 512-byte USTAR header of a member: mode 0644, no owner, time 0."""
    info = tarfile.TarInfo(name)
    info.size = length
    info.mode = 0o644
    return info.tobuf(format=tarfile.USTAR_FORMAT, encoding="ascii", errors="strict")


def encode_json(value: object) -> bytes:
    """Canonical JSON of a sample's side data: sorted keys, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode("ascii")


class ShardFile:
    """One shard being written: under a temporary name until `close` renames it into place."""

    def __init__(self, root: str | Path, tar: str, bucket: str):
        """root: the data set folder. tar: final path inside it, such as ``shards/1024x1024-00000.tar``."""
        self.tar, self.bucket = tar, bucket
        self.final = Path(root) / tar
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.final.with_name(f".{self.final.name}.tmp{os.getpid()}")
        self._file = open(self.temporary, "wb")  # noqa: SIM115  (lives as long as the shard)
        self._digest = hashlib.sha256()
        self.bytes = 0
        self.samples = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def add(self, key: str, members: dict[str, bytes]) -> Location:
        """Append one sample; the first member is the primary one.

        Raises:
            DataError: a key or extension that WebDataset readers would split wrongly.
        """
        if not _KEY.fullmatch(key):
            raise DataError(f"{self.tar}: key {key!r} is not plain ASCII without dots, at most 80 characters")
        spans = {}
        for extension, payload in members.items():
            if not _EXTENSION.fullmatch(extension):
                raise DataError(f"{self.tar}: member extension {extension!r} of {key} is not a plain word")
            self._write(member_header(f"{key}.{extension}", len(payload)))
            spans[extension] = (self.bytes, len(payload))
            self._write(payload)
            self._write(bytes(padded(len(payload)) - len(payload)))
        self.samples += 1
        offset, length = next(iter(spans.values()))
        return Location(self.tar, offset, length, spans)

    def close(self) -> ShardInfo:
        """Write the end-of-archive blocks, flush to disk and rename into place."""
        self._write(bytes(2 * BLOCK_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.temporary, self.final)
        return ShardInfo(self.tar, self.bytes, self._digest.hexdigest(), self.samples, self.bucket)

    def abort(self) -> None:
        """Forget what was written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes one bucket's samples to ``<root>/shards/<bucket>-NNNNN.tar``, a new file per ``max_bytes``.

    A sample is never split: a shard is closed before the sample that would pass ``max_bytes``. ``first`` is the
    number of the first shard.
    """

    def __init__(self, root: str | Path, bucket: str, max_bytes: int = MAX_SHARD_BYTES, first: int = 0):
        self.root, self.bucket, self.max_bytes, self.first = Path(root), bucket, max_bytes, first
        self.finished: list[ShardInfo] = []
        self._current: ShardFile | None = None

    def add(self, key: str, members: dict[str, bytes]) -> Location:
        """Append one sample (``{extension: payload}``, primary member first) and say where it lies."""
        size = sample_bytes([len(p) for p in members.values()])
        if self._current is not None and self._current.bytes + size + 2 * BLOCK_BYTES > self.max_bytes:
            self.finished.append(self._current.close())
            self._current = None
        if self._current is None:
            name = shard_name(self.bucket, self.first + len(self.finished))
            self._current = ShardFile(self.root, name, self.bucket)
        return self._current.add(key, members)

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; returns every shard written."""
        if self._current is not None:
            self.finished.append(self._current.close())
            self._current = None
        return self.finished

    def abort(self) -> None:
        """Drop the unfinished shard."""
        if self._current is not None:
            self._current.abort()
            self._current = None


def shard_name(bucket: str, number: int) -> str:
    """``shards/<bucket>-NNNNN.tar``."""
    return f"shards/{bucket}-{number:05d}.tar"


class ShardReader:
    """Reads samples by position with ``pread``: no shared file offset, so forked workers may share it."""

    def __init__(self, root: str | Path, max_open_files: int = 64):
        self.root = Path(root)
        self._max_open_files = max_open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, tar: str, offset: int, length: int, key: str) -> bytes:
        """Payload of the primary member of ``key``.

        Raises:
            DataError: the shard is missing, shorter than the index says, or holds something else there.
        """
        return self.read_sample(tar, offset, length, key, with_json=False)[0]

    def read_sample(
        self, tar: str, offset: int, length: int, key: str, with_json: bool = True
    ) -> tuple[bytes, dict]:
        """Payload of the primary member and the parsed ``<key>.json`` behind it ({} when there is none)."""
        start, body = offset - BLOCK_BYTES, BLOCK_BYTES + padded(length)
        extra = BLOCK_BYTES + _JSON_OVERREAD_BYTES if with_json else 0
        data = self._pread(tar, body + extra, start)
        name = data[:100].split(b"\0", 1)[0].decode("ascii", "replace")
        if len(data) < BLOCK_BYTES + length or start < 0 or name.rsplit(".", 1)[0] != key:
            raise DataError(
                f"{self.root / tar}: sample {key} is not at byte {offset}; shard and index do not belong "
                "together or the shard is damaged: make the data set again or copy it again"
            )
        payload = data[BLOCK_BYTES : BLOCK_BYTES + length]
        return payload, self._json_behind(tar, data[body:], start + body, key) if with_json else {}

    def _json_behind(self, tar: str, data: bytes, position: int, key: str) -> dict:
        if data[:100].split(b"\0", 1)[0] != f"{key}.json".encode():
            return {}
        try:
            size = tarfile.TarInfo.frombuf(data[:BLOCK_BYTES], "ascii", "strict").size
            if BLOCK_BYTES + size > len(data):
                data = self._pread(tar, BLOCK_BYTES + size, position)
            return json.loads(data[BLOCK_BYTES : BLOCK_BYTES + size])
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(
                f"{self.root / tar}: {key}.json is damaged ({error}); copy the shard again"
            ) from error

    def _pread(self, tar: str, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._open(tar), length, max(offset, 0))
        except OSError as error:
            raise DataError(f"{self.root / tar}: cannot be read ({error.strerror})") from error

    def _open(self, tar: str) -> int:
        if tar in self._files:
            self._files.move_to_end(tar)
            return self._files[tar]
        if len(self._files) >= self._max_open_files:
            os.close(self._files.popitem(last=False)[1])
        self._files[tar] = os.open(self.root / tar, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[tar]

    def close(self) -> None:
        """Close every open file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict:
        return {"root": self.root, "_max_open_files": self._max_open_files, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()
