"""Exact duplicates: files of the same bytes, and pictures of the same pixels in different files.

Bytes are compared by their sha256. Pixels are compared where the key of the reduced picture is the same: those files
are decoded once more in full (`images.decode`, so as displayed and in sRGB) and compared by the sha256 of all pixels.
A picture that takes the decoder's process down is quarantined, alone, as in a row stage. In memory: 16 bytes per image,
and the columns of candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation import duplicates, picture_tasks
from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.picture_tasks import PictureTask, map_pictures
from megatron_nucleus.data.curation.row_part import CRASHED
from megatron_nucleus.data.curation.stage import (
    DROPS_SCHEMA,
    REFERENCE_COLUMNS,
    NoSettings,
    Update,
    corpus_stage,
)
from megatron_nucleus.data.curation.store import Corpus
from megatron_nucleus.data.images import UnusableImage, quiet_decoding

_CRASHED = -2  # label of a picture that ended the process; -1: no candidate
_REASONS = (
    ("exact_duplicate", "the same bytes as {item}"),
    ("pixel_duplicate", "the same pixels as {item}"),
)


@corpus_stage(
    NoSettings,
    reads=(*duplicates.READS, *REFERENCE_COLUMNS, "pixel_key"),
    adds=duplicates.ADDS,
    rejects=tuple(reason for reason, _ in _REASONS),
    modules=(duplicates, picture_tasks),
)
def exact_duplicates(corpus: Corpus, settings: NoSettings) -> Iterator[Update]:
    """Keep one row per content; see the module docstring."""
    ids, pixels = _keys(corpus)
    rows = np.flatnonzero(_repeated(ids) | _repeated(pixels))
    label = np.full(len(ids), -1, np.int64)
    label[rows] = _labels(corpus, rows)
    crashed = rows[label[rows] == _CRASHED]
    updates = duplicates.merge(corpus, _clusters(corpus, rows[label[rows] != _CRASHED], label))
    for part, low, update in zip(corpus.parts, corpus.starts()[:-1].tolist(), updates, strict=True):
        position = corpus.read(part, [])["position"].to_numpy()
        here = crashed[(crashed >= low) & (crashed < low + len(position))]
        yield _with_crashes(update, position[here - low])


def _with_crashes(update: Update, position: np.ndarray) -> Update:
    """The update of a part with drops of the rows that ended a process. position: theirs, ascending."""
    if not len(position):
        return update
    columns = [
        pa.array(position, pa.int32()),
        pa.array([CRASHED] * len(position), pa.string()),
        pa.array(["decoding it ended the whole process"] * len(position), pa.string()),
    ]
    drops = pa.concat_tables([update.drops, pa.Table.from_arrays(columns, schema=DROPS_SCHEMA)])
    return update._replace(drops=drops.sort_by("position"))


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
    """int64 [candidates]: equal for equal content; `_CRASHED` where decoding it ended the process."""
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
    references = table.select(list(REFERENCE_COLUMNS)).take(pa.array(looked)).to_pylist()
    sums = dict(zip(looked.tolist(), map_pictures(corpus, pixel_sums, references), strict=True))
    same: dict[str, int] = {}
    label = np.arange(len(first), dtype=np.int64)
    for content, row in enumerate(first.tolist()):
        found = sums.get(row)
        if isinstance(found, WorkerDied):
            label[content] = _CRASHED
        elif found is not None:
            label[content] = same.setdefault(found, content)
    return label[by_bytes]


def pixel_sums(task: PictureTask) -> list[str | None]:
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
