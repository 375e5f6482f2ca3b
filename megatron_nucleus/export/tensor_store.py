"""Read tensors out of safetensors files one slice at a time, whether they are whole or split over many files.

Plain file reads instead of memory maps: resident memory is what was asked for and nothing else. Files written by
torch.distributed.checkpoint's HuggingFaceStorageWriter hold *pieces* of tensors (`coverage.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_nucleus.export.coverage import check_complete, read_layout
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.utils.errors import DataError

PIECE_BYTES = 8 << 20  # how much of a tensor is in memory at once when files are streamed


class TensorStore:
    """Named tensors in a set of safetensors files. Only headers are read until a tensor is asked for.

    Raises (constructor): DataError for a damaged file, or when the stored pieces of a tensor do not tile it.
    """

    def __init__(self, files: Iterable[Path]):
        files = list(files)
        layout = read_layout(files)
        self._pieces = {name: stored.pieces for name, stored in layout.items()}
        self._info = {name: stored.info for name, stored in layout.items()}
        try:
            check_complete(layout, self._info)
        except DataError as error:
            raise DataError(f"{files[0].parent}: {error}; copy the checkpoint again") from error

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
