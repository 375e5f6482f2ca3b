"""Write safetensors files slice by slice: headers come from names, shapes and dtypes, so no tensor must be held.

Headers are padded with spaces to a multiple of 8 bytes, and wider dtypes come first in a file, so that every
tensor starts at a multiple of its element size (as the safetensors library itself lays files out).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_nucleus.export.safetensors_header import DTYPES, TensorInfo
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_json_atomic

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int, option: str = "--max-shard-size") -> int:
    """``"5GB"`` (10^9), ``"500MB"``, ``"2GiB"`` (2^30) or plain bytes -> bytes.

    Raises:
        ConfigError: not a positive size, naming ``option``.
    """
    cleaned = str(text).strip().upper()
    digits = cleaned.rstrip("BGIKM")
    unit = cleaned[len(digits) :].strip()
    try:
        size = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"{option} {text}: expected a positive size such as 5GB, 500MB or 2GiB")
    return size


def assign_shards(entries: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Cut ``entries`` in order into files of at most ``max_shard_bytes`` (a larger tensor has its own file)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in entries.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return [sorted(shard, key=lambda name: -entries[name].dtype.itemsize) for shard in shards]


def build_header(entries: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and padded JSON header for tensors stored in the order of ``entries``."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in entries.items():
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsStream:
    """Stream tensors into ``{prefix}-00001-of-0000n.safetensors`` files of one folder.

    Use as a context manager; write the tensors in the order of `order`, each in one or more consecutive slices of
    rows. `close` (or a clean exit) checks that everything arrived, renames the last file to its final name and
    writes the index. Every file is fsynced before it gets its name.

    Args:
        folder: existing folder.
        prefix: file name before the shard number.
        entries: name -> shape and dtype of everything that will be written.
        max_shard_bytes: limit of a file's tensor data; a single larger tensor has a file of its own.
        index_name: file name of the JSON index (name -> file), or None for none.

    Attributes:
        files: after closing, file name -> {"bytes", "sha256"} of every file that was written, index included.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        entries: Mapping[str, TensorInfo],
        max_shard_bytes: int = 5 * 10**9,
        index_name: str | None = None,
    ):
        self._folder, self._entries, self._index_name = folder, dict(entries), index_name
        self._shards = assign_shards(entries, max_shard_bytes)
        count = len(self._shards)
        self._names = [f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._shard = -1
        self._stream = None
        self._pending: list[str] = []
        self._missing_bytes = 0
        self.files: dict[str, dict] = {}

    @property
    def order(self) -> list[str]:
        """Names in the order in which they must be written."""
        return [name for shard in self._shards for name in shard]

    def write(self, name: str, rows: Tensor) -> None:
        """Append ``rows``, the next slice of ``name`` along its first dimension."""
        if not rows.numel():
            return
        while not self._missing_bytes:
            self._next_tensor()
        info = self._entries[name]
        if name != self._pending[0] or rows.dtype != info.dtype or rows.shape[1:] != info.shape[1:]:
            raise ValueError(
                f"expected {info.dtype} rows of {self._pending[0]}, got {rows.dtype} rows of {name}"
            )
        data = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if len(data) > self._missing_bytes:
            raise ValueError(f"{name}: {len(data)} bytes where {self._missing_bytes} are missing")
        self._digest.update(data)
        self._stream.write(data)
        self._missing_bytes -= len(data)

    def _next_tensor(self) -> None:
        """Move on to the next tensor that has data, opening and closing files on the way."""
        if self._pending:
            self._pending.pop(0)
        while not self._pending:
            self._finish_file()
            self._open_file()
        self._missing_bytes = self._entries[self._pending[0]].nbytes

    def _open_file(self) -> None:
        self._shard += 1
        if self._shard >= len(self._shards):
            raise ValueError("more tensors written than announced")
        self._pending = list(self._shards[self._shard])
        header = build_header({name: self._entries[name] for name in self._pending}, {"format": "pt"})
        self._stream = open(self._folder / f".{self._names[self._shard]}.tmp", "wb")  # noqa: SIM115 - closed by _finish_file
        self._digest = hashlib.sha256(header)
        self._stream.write(header)

    def _finish_file(self) -> None:
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        name = self._names[self._shard]
        os.replace(self._folder / f".{name}.tmp", self._folder / name)
        self.files[name] = {"bytes": size, "sha256": self._digest.hexdigest()}
        self._stream = None

    def close(self) -> None:
        """Finish the last file and the index; ValueError when a tensor was not fully written."""
        while True:
            if self._missing_bytes:
                raise ValueError(f"{self._pending[0]}: {self._missing_bytes} bytes were never written")
            if self._shard == len(self._shards) - 1 and len(self._pending) <= 1:
                break
            self._next_tensor()
        self._finish_file()
        if self._index_name:
            self._write_index(self._index_name)

    def _write_index(self, index_name: str) -> None:
        pairs = zip(self._names, self._shards, strict=True)
        weight_map = {name: file for file, shard in pairs for name in shard}
        total = sum(info.nbytes for info in self._entries.values())
        path = self._folder / index_name
        write_json_atomic(path, {"metadata": {"total_size": total}, "weight_map": weight_map})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.files[index_name] = {"bytes": path.stat().st_size, "sha256": digest}

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._stream is not None:
            self._stream.close()
            (self._folder / f".{self._names[self._shard]}.tmp").unlink(missing_ok=True)
