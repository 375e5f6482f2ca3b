"""Whether tensors that lie in pieces in many files are complete: every element there, and there once.

Only headers are read. The work is linear in the pieces as long as tensors are cut by rows.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_nucleus.export.safetensors_header import Piece, TensorInfo, read_header
from megatron_nucleus.utils.errors import DataError


class StoredTensor(NamedTuple):
    """A tensor as it was found: its dtype and its pieces, which may not be all of it."""

    dtype: torch.dtype
    pieces: list[Piece]

    @property
    def info(self) -> TensorInfo:
        """The smallest shape that holds all pieces."""
        corners = [[o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in self.pieces]
        return TensorInfo(tuple(map(max, zip(*corners, strict=True))), self.dtype)


def read_layout(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor in ``files`` with its pieces.

    Raises:
        DataError: a damaged file, or pieces of one tensor that differ in dtype or number of dimensions.
    """
    layout: dict[str, StoredTensor] = {}
    for file in files:
        entries, metadata = read_header(file)
        offsets = _offsets(file, metadata)
        for name, (info, start) in entries.items():
            piece = Piece(file, start, info.shape, offsets.get(name, (0,) * len(info.shape)))
            stored = layout.setdefault(name, StoredTensor(info.dtype, []))
            same_rank = all(len(p.shape) == len(piece.offsets) for p in (piece, *stored.pieces[:1]))
            if stored.dtype != info.dtype or not same_rank:
                raise DataError(f"{file}: tensor {name} contradicts its other pieces")
            stored.pieces.append(piece)
    return layout


def check_complete(layout: Mapping[str, StoredTensor], expected: Mapping[str, TensorInfo]) -> None:
    """Check that ``layout`` holds the tensors of ``expected`` and nothing else, every element once.

    Raises:
        DataError: naming the first tensor that is missing, unknown, of another shape or dtype, or that has holes
            or overlaps, with the rows (of an expert tensor: the experts).
    """
    for name in [*expected, *layout]:
        if name not in layout:
            raise DataError(f"tensor {name} has {_rows(expected[name].shape)} rows; missing: all of them")
        if name not in expected:
            raise DataError(f"tensor {name} does not belong here ({layout[name].pieces[0].file})")
    for name, info in expected.items():
        stored = layout[name]
        if stored.dtype != info.dtype or len(stored.info.shape) != len(info.shape):
            raise DataError(
                f"tensor {name} is {list(stored.info.shape)} {stored.dtype} in {stored.pieces[0].file}, "
                f"expected: {list(info.shape)} {info.dtype}"
            )
        wrong = _wrong_rows(stored.pieces, info.shape)
        if wrong:
            listed = "; ".join(f"{what}: {_span(low, high)}" for low, high, what in wrong[:4])
            more = f"; {len(wrong) - 4} more ranges" if len(wrong) > 4 else ""
            raise DataError(f"tensor {name} has {_rows(info.shape)} rows; {listed}{more}")


def _wrong_rows(pieces: list[Piece], shape: tuple[int, ...]) -> list[tuple[int, int, str]]:
    """(first row, row after the last, what is wrong) of every range of rows that is not there exactly once."""
    rows, row_size = _rows(shape), math.prod(shape[1:])
    boxes = sorted((p for p in pieces if math.prod(p.shape)), key=_first_row)
    edges = sorted({0, rows, *map(_first_row, boxes), *map(_end_row, boxes)})
    wrong: list[tuple[int, int, str]] = []
    active: list[Piece] = []
    waiting = iter([*boxes, None])
    upcoming = next(waiting)
    for low, high in itertools.pairwise(edges):
        active = [p for p in active if _end_row(p) > low]
        while upcoming is not None and _first_row(upcoming) == low:
            active.append(upcoming)
            upcoming = next(waiting)
        what = _judge(active, row_size, shape, beyond=low >= rows)
        if what and wrong and wrong[-1][1:] == (low, what):
            wrong[-1] = (wrong[-1][0], high, what)
        elif what:
            wrong.append((low, high, what))
    return wrong


def _judge(active: list[Piece], row_size: int, shape: tuple[int, ...], beyond: bool) -> str:
    """What is wrong with rows that the ``active`` pieces hold; "" when nothing is."""
    wide = (zip(p.offsets[1:], p.shape[1:], shape[1:], strict=True) for p in active)
    if active and (beyond or any(o + n > size for piece in wide for o, n, size in piece)):
        return "outside of its shape"
    if any(_overlap(a, b) for a, b in itertools.combinations(active, 2)):
        return "stored twice"
    if not beyond and sum(math.prod(p.shape[1:]) for p in active) < row_size:
        return "missing"
    return ""


def _overlap(a: Piece, b: Piece) -> bool:
    corners = zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    return all(max(oa, ob) < min(oa + na, ob + nb) for oa, na, ob, nb in corners)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1  # a scalar is one row


def _span(low: int, high: int) -> str:
    return f"row {low}" if high == low + 1 else f"rows {low}-{high - 1}"


def _first_row(piece: Piece) -> int:
    return piece.offsets[0] if piece.offsets else 0


def _end_row(piece: Piece) -> int:
    return _first_row(piece) + _rows(piece.shape)


def _offsets(file: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Corner of each piece in its tensor, as torch.distributed.checkpoint notes it; whole tensors have none."""
    try:
        noted = json.loads(metadata.get("DCP_SHARDING_INFO") or "{}")
        return {name: tuple(map(int, entry["saved_offsets"])) for name, entry in noted.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: damaged sharding information ({error})") from error
