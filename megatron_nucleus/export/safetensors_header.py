"""What a safetensors file says of its tensors: names, shapes, dtypes and positions, checked against its size.

The format is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the
data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

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
