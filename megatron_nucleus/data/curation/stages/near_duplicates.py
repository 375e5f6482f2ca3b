"""Near-duplicates: resized, recompressed or lightly edited copies, found by perceptual hashes.

Pairs within a few bits of the 64-bit hash are candidates (published: Hamming distance below 5); the 256-bit hash must
agree as well before a row is dropped. The best row of a cluster stays, and every dropped row is itself near the row
that stays for it. Blank pictures look alike to any hash: the `blank` stage comes first.

What is best: `near_duplicates.keep` has the rule, from the licence to the id. A score counts in it only where
``keep_scorer`` names one, right after the size; its stage stands before this one then. Whether a picture is in colour
is looked up for those copies alone that are equal in licence, size and score.

Hashes go to files, so memory is bounded by the search's own limit and about 60 bytes per image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_nucleus.data.curation import colour, duplicates, measures, picture_tasks
from megatron_nucleus.data.curation import near_duplicates as library
from megatron_nucleus.data.curation.colour import in_colour
from megatron_nucleus.data.curation.near_duplicates import (
    Candidates,
    SearchConfig,
    components,
    hash_check,
    keep_order,
    search,
    star_clusters,
)
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS, Update, corpus_stage
from megatron_nucleus.data.curation.store import Corpus
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import open_atomic

_HASH_BYTES = 32
_REASONS = (("near_duplicate", "{distance} of 64 bits from {item}"),)


@dataclasses.dataclass(frozen=True)
class NearDuplicatesConfig:
    """What counts as a copy of another picture."""

    # Any bound gives the same result, byte for byte.
    EXECUTION: ClassVar[tuple[str, ...]] = ("near_memory_bytes",)

    near_max_bits: int = knob(4, "64-bit hashes that differ in more bits are different pictures", unit="bits")
    near_verify_bits: int = knob(
        31,
        "256-bit hashes of copies differ in at most so many bits (the limit that PDQ recommends)",
        unit="bits",
    )
    near_memory_bytes: int = knob(1 << 30, "working memory of one search process", unit="bytes")
    keep_scorer: str | None = knob(
        None,
        "of copies with equal licence and size the one with the best score of this name stays; none: no score",
    )
    keep_scorer_best: str = knob(
        "highest", "which score of keep_scorer is the best", choices=("highest", "lowest")
    )

    def __post_init__(self) -> None:
        hash_check(np.zeros((0, _HASH_BYTES), np.uint8), self.near_verify_bits)
        self.search()
        if self.keep_scorer is not None and not self.keep_scorer.strip():
            raise ConfigError("keep_scorer is empty; name a score, or leave it out")
        if self.keep_scorer is None and self.keep_scorer_best != "highest":
            raise ConfigError(f"keep_scorer_best {self.keep_scorer_best} does nothing without keep_scorer")

    def search(self) -> SearchConfig:
        """Settings of the search."""
        return SearchConfig(self.near_max_bits, self.near_memory_bytes)


@corpus_stage(
    NearDuplicatesConfig,
    reads=(*duplicates.READS, *REFERENCE_COLUMNS, "phash", "phash256"),
    adds=duplicates.ADDS,
    rejects=tuple(reason for reason, _ in _REASONS),
    modules=(colour, duplicates, library, measures, picture_tasks),
    needs_scores=lambda settings: {"keep_scorer": settings.keep_scorer} if settings.keep_scorer else {},
)
def near_duplicates(corpus: Corpus, settings: NearDuplicatesConfig) -> Iterator[Update]:
    """Keep one row per cluster of near-duplicates; see the module docstring."""
    total = int(corpus.starts()[-1])
    short, long = corpus.work / "phash.npy", corpus.work / "phash256.npy"
    _write_hashes(corpus, total, short, long)
    found = search(short, corpus.work / "search", settings.search(), corpus.map)
    check = hash_check(np.load(long, mmap_mode="r"), settings.near_verify_bits)
    order = _best_first(corpus, found.pairs, settings)
    representative, distance = star_clusters(found.pairs, order, check).for_all(total)
    yield from duplicates.merge(
        corpus,
        duplicates.Clusters(
            representative.astype(np.int64), np.zeros(total, np.uint8), distance.astype(np.int16), _REASONS
        ),
    )


def _best_first(corpus: Corpus, pairs: np.ndarray, settings: NearDuplicatesConfig) -> np.ndarray:
    """All rows of the pairs in the order of the keep rule [int64]."""
    rows = np.unique(np.concatenate([pairs["low"], pairs["high"]])).astype(np.int64)
    found = duplicates.candidates(
        corpus, rows, settings.keep_scorer, lowest=settings.keep_scorer_best == "lowest"
    )
    tied = np.flatnonzero(_tied(found, rows, pairs))
    found.colour[tied] = in_colour(corpus, rows[tied])
    return rows[keep_order(found)]


def _tied(found: Candidates, rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool [rows]: another row that hangs together with it has the same licence_known, pixels and score."""
    cluster = components(len(rows), np.searchsorted(rows, pairs["low"]), np.searchsorted(rows, pairs["high"]))
    score = np.where(np.isnan(found.score), np.float32(np.inf), found.score)  # NaN is not equal to itself
    keys = np.stack([cluster, found.licence_known, found.pixels, score.view(np.int32)], axis=1)
    _, key, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return counts[key.reshape(-1)] > 1


def _write_hashes(corpus: Corpus, total: int, short: Path, long: Path) -> None:
    """The hashes of all rows as ``.npy`` files: uint64 [rows] and uint8 [rows, 32]."""
    starts = corpus.starts()
    with open_atomic(short) as first, open_atomic(long) as second:
        for file, shape, kind in ((first, (total,), "<u8"), (second, (total, _HASH_BYTES), "|u1")):
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for part, rows in zip(corpus.parts, np.diff(starts).tolist(), strict=True):
            table = corpus.read(part, ["phash", "phash256"])
            table["phash"].to_numpy().astype("<u8").tofile(first)
            payload = b"".join(table["phash256"].to_pylist())
            assert len(payload) == _HASH_BYTES * rows
            second.write(payload)
