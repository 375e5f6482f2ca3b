"""Read tensors out of safetensors files one slice at a time, whether they are whole or split over many files.

Plain file reads instead of memory maps: resident memory is what was asked for and nothing else. The format is an
8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the data
(https://github.com/huggingface/safetensors). Files written by torch.distributed.checkpoint's
HuggingFaceStorageWriter hold *pieces* of tensors; their offsets in the full tensor stand in the header's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_nucleus.utils.errors import DataError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
PIECE_BYTES = 8 << 20  # how much of a tensor is in memory at once when files are streamed


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a tensor as it lies in one file: ``start`` is its position in bytes, ``offsets`` its corner."""

    file: Path
    start: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def read_header(file: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        ``{name: (info, position of its data in the file)}`` and the file's metadata.

    Raises:
        DataError: the file is missing, truncated or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise DataError(f"{file}: truncated or not a safetensors file ({size} bytes); copy it again")
            header = json.loads(stream.read(length))
        return _parse_header(file, header, 8 + length, size)
    except FileNotFoundError:
        raise DataError(f"{file}: missing; copy the checkpoint again, with all of its files") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: damaged safetensors header ({error}); copy the file again") from error


def _parse_header(file: Path, header: dict, data: int, size: int) -> tuple[dict, dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    entries, end = {}, 0
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise DataError(
                f"{file}: tensor {name} has dtype {entry['dtype']}; readable are: {', '.join(DTYPES)}"
            )
        info = TensorInfo(tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]])
        first, last = entry["data_offsets"]
        if first < 0 or last - first != info.nbytes or any(n < 0 for n in info.shape):
            raise DataError(
                f"{file}: tensor {name} has {last - first} bytes for shape {list(info.shape)}; copy it again"
            )
        entries[name] = (info, data + first)
        end = max(end, last)
    if data + end != size:
        raise DataError(f"{file}: {size} bytes where its header announces {data + end}; copy the file again")
    return entries, metadata


class TensorStore:
    """Named tensors in a set of safetensors files. Only headers are read until a tensor is asked for.

    Raises (constructor): DataError for a damaged file, or when the stored pieces of a tensor do not tile it.
    """

    def __init__(self, files: Iterable[Path]):
        self._pieces: dict[str, list[Piece]] = {}
        self._info: dict[str, TensorInfo] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in files:
            entries, metadata = read_header(file)
            sharding = _sharding_info(file, metadata)
            for name, (info, start) in entries.items():
                offsets = tuple(sharding[name]) if name in sharding else (0,) * len(info.shape)
                if len(offsets) != len(info.shape) or dtypes.setdefault(name, info.dtype) != info.dtype:
                    raise DataError(
                        f"{file}: tensor {name} contradicts its other pieces; copy the checkpoint again"
                    )
                self._pieces.setdefault(name, []).append(Piece(file, start, info.shape, offsets))
        for name, pieces in self._pieces.items():
            self._info[name] = TensorInfo(_full_shape(name, pieces), dtypes[name])

    def names(self) -> list[str]:
        """Names in the order of the files."""
        return list(self._info)

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def info(self, name: str) -> TensorInfo:
        """Full shape and dtype of ``name``."""
        return self._info[name]

    def files(self, name: str) -> list[Path]:
        """Files that hold ``name`` or a piece of it."""
        return [piece.file for piece in self._pieces[name]]

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU, freshly allocated."""
        info = self._info[name]
        if not info.shape:
            (piece,) = self._pieces[name]
            out = torch.empty((), dtype=info.dtype)
            _read_into(piece.file, piece.start, out)
            return out
        return self.read_rows(name, 0, info.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension, assembled from every piece that overlaps them."""
        info = self._info[name]
        out = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        for piece in self._pieces[name]:
            low, high = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.shape[0])
            if low >= high or 0 in piece.shape:
                continue
            row_bytes = math.prod(piece.shape[1:]) * info.dtype.itemsize
            position = piece.start + (low - piece.offsets[0]) * row_bytes
            box = (
                slice(low - start, high - start),
                *(slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.shape[1:], strict=True)),
            )
            if piece.shape[1:] == info.shape[1:]:
                _read_into(piece.file, position, out[box])
            else:
                part = torch.empty((high - low, *piece.shape[1:]), dtype=info.dtype)
                _read_into(piece.file, position, part)
                out[box] = part
        return out


def row_ranges(
    info: TensorInfo, start: int, stop: int, piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[int, int]]:
    """Cut rows ``start:stop`` of a tensor in ranges of about ``piece_bytes`` (at least one row each)."""
    row_bytes = max(1, math.prod(info.shape[1:]) * info.dtype.itemsize)
    step = max(1, piece_bytes // row_bytes)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def _sharding_info(file: Path, metadata: dict[str, str]) -> dict[str, list[int]]:
    text = metadata.get("DCP_SHARDING_INFO")
    if not text:
        return {}
    try:
        return {name: [int(n) for n in entry["saved_offsets"]] for name, entry in json.loads(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: damaged sharding information ({error}); copy the file again") from error


def _full_shape(name: str, pieces: list[Piece]) -> tuple[int, ...]:
    """Extent of all pieces; DataError when they leave a hole or overlap."""
    rank = len(pieces[0].shape)
    shape = tuple(max(p.offsets[i] + p.shape[i] for p in pieces) for i in range(rank))
    overlap = any(_overlap(a, b) for i, a in enumerate(pieces) for b in pieces[:i])
    if overlap or sum(math.prod(p.shape) for p in pieces) != math.prod(shape):
        files = ", ".join(sorted({str(p.file) for p in pieces}))
        what = "is stored twice" if overlap else "is incomplete: a file is missing"
        raise DataError(f"tensor {name} {what} (found in {files}); copy the checkpoint again")
    return shape


def _overlap(a: Piece, b: Piece) -> bool:
    corners = zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    return all(max(oa, ob) < min(oa + na, ob + nb) for oa, na, ob, nb in corners)


def _read_into(file: Path, position: int, out: Tensor) -> None:
    """Fill a contiguous tensor with the bytes at ``position``."""
    view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(position, os.SEEK_SET)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise DataError(f"{file}: ends before its last tensor; copy the file again")
                view = view[count:]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
