"""Exact duplicates: files of the same bytes, and pictures of the same pixels in different files.

Bytes are compared by their sha256. Pixels are compared where the key of the reduced picture is the same: those files
are decoded once more in full (`images.decode`, so as displayed and in sRGB) and compared by the sha256 of all pixels.
In memory: 16 bytes per image, and the columns of candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation import duplicates
from megatron_nucleus.data.curation.stage import (
    REFERENCE_COLUMNS,
    NoSettings,
    PayloadSource,
    Update,
    corpus_stage,
)
from megatron_nucleus.data.curation.store import Corpus
from megatron_nucleus.data.images import UnusableImage, quiet_decoding

_CANDIDATES_PER_TASK = 64
_REASONS = (
    ("exact_duplicate", "the same bytes as {item}"),
    ("pixel_duplicate", "the same pixels as {item}"),
)


@corpus_stage(
    NoSettings,
    reads=(*duplicates.READS, *REFERENCE_COLUMNS, "pixel_key"),
    adds=duplicates.ADDS,
    rejects=tuple(reason for reason, _ in _REASONS),
    modules=(duplicates,),
)
def exact_duplicates(corpus: Corpus, settings: NoSettings) -> Iterator[Update]:
    """Keep one row per content; see the module docstring."""
    ids, pixels = _keys(corpus)
    rows = np.flatnonzero(_repeated(ids) | _repeated(pixels))
    label = np.full(len(ids), -1, np.int64)
    label[rows] = _labels(corpus, rows)
    yield from duplicates.merge(corpus, _clusters(corpus, rows, label))


def _keys(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """First 64 bits of id and of pixel key of all rows [uint64]."""
    ids, pixels = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for part in corpus.parts:
        table = corpus.read(part, ["id", "pixel_key"])
        heads = "".join(text[:16] for text in table["id"].to_pylist())
        ids.append(np.frombuffer(bytes.fromhex(heads), ">u8").astype(np.uint64))
        heads = b"".join(key[:8] for key in table["pixel_key"].to_pylist())
        pixels.append(np.frombuffer(heads, ">u8").astype(np.uint64))
    return np.concatenate(ids), np.concatenate(pixels)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """bool [rows]: the key occurs more than once."""
    ordered = np.sort(keys)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    at = np.searchsorted(twice, keys)
    return (
        (at < len(twice)) & (np.take(twice, at, mode="clip") == keys)
        if len(twice)
        else np.zeros(len(keys), bool)
    )


def _labels(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """int64 [candidates]: equal for equal content."""
    table = corpus.gather(rows, ["id", "width_px", "height_px", "pixel_key", *REFERENCE_COLUMNS])
    _, by_bytes = np.unique(np.array(table["id"].to_pylist(), dtype="S64"), return_inverse=True)
    keys = np.array(
        [
            key + f" {width} {height}".encode()
            for key, width, height in zip(
                *(table[name].to_pylist() for name in ("pixel_key", "width_px", "height_px")), strict=True
            )
        ],
        dtype=object,
    )
    first = np.unique(by_bytes, return_index=True)[1]  # one row of each content is decoded
    _, key = np.unique(keys.astype(bytes)[first], return_inverse=True)
    looked = first[np.bincount(key)[key] > 1]
    sums = dict(zip(looked.tolist(), _pixel_sums(corpus, table.take(pa.array(looked))), strict=True))
    same: dict[str, int] = {}
    label = np.arange(len(first), dtype=np.int64)
    for content, row in enumerate(first.tolist()):
        if (found := sums.get(row)) is not None:
            label[content] = same.setdefault(found, content)
    return label[by_bytes]


def _pixel_sums(corpus: Corpus, table: pa.Table) -> list[str | None]:
    references = table.select(list(REFERENCE_COLUMNS)).to_pylist()
    pieces = [
        _PixelTask(corpus.source, tuple(references[i : i + _CANDIDATES_PER_TASK]))
        for i in range(0, len(references), _CANDIDATES_PER_TASK)
    ]
    return [one for sums in corpus.map(pixel_sums, pieces) for one in sums]


class _PixelTask(NamedTuple):
    source: PayloadSource
    references: tuple[dict[str, Any], ...]


def pixel_sums(task: _PixelTask) -> list[str | None]:
    """Hex sha256 over size and RGB bytes of each picture; None for one that can no longer be decoded."""
    out: list[str | None] = []
    with quiet_decoding():
        for reference in task.references:
            try:
                picture = task.source.decode(task.source.read(reference), None)
            except UnusableImage:
                out.append(None)  # kept: packing looks at the bytes again and names the file
                continue
            digest = hashlib.sha256(repr(picture.size).encode())
            digest.update(picture.tobytes())
            out.append(digest.hexdigest())
    return out


def _clusters(corpus: Corpus, rows: np.ndarray, label: np.ndarray) -> duplicates.Clusters:
    total = len(label)
    representative = np.arange(total, dtype=np.int64)
    reason = np.zeros(total, np.uint8)
    if len(rows):
        ordered = duplicates.best_first(corpus, rows)
        _, first, of = np.unique(label[ordered], return_index=True, return_inverse=True)
        representative[ordered] = ordered[first][of]
        goal = np.searchsorted(rows, representative[rows])
        ids = np.array(corpus.gather(rows, ["id"])["id"].to_pylist())
        reason[rows] = ids != ids[goal]
    return duplicates.Clusters(representative, reason, np.full(total, -1, np.int16), _REASONS)
