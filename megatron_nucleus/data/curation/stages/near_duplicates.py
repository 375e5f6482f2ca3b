"""Near-duplicates: resized, recompressed or lightly edited copies, found by perceptual hashes.

Pairs within a few bits of the 64-bit hash are candidates (published: Hamming distance below 5); the 256-bit hash must
agree as well before a row is dropped. The best row of a cluster stays (`near_duplicates.keep_order`), and every dropped
row is itself near the row that stays for it. Blank pictures look alike to any hash: the `blank` stage comes first.

Hashes go to files, so memory is bounded by the search's own limit and about 60 bytes per image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_nucleus.data.curation import duplicates
from megatron_nucleus.data.curation import near_duplicates as library
from megatron_nucleus.data.curation.near_duplicates import SearchConfig, hash_check, search, star_clusters
from megatron_nucleus.data.curation.stage import Update, corpus_stage
from megatron_nucleus.data.curation.store import Corpus
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.files import open_atomic

_HASH_BYTES = 32
_REASONS = (("near_duplicate", "{distance} of 64 bits from {item}"),)


@dataclasses.dataclass(frozen=True)
class NearDuplicatesConfig:
    """What counts as a copy of another picture."""

    near_max_bits: int = knob(4, "64-bit hashes that differ in more bits are different pictures", unit="bits")
    near_verify_bits: int = knob(
        31,
        "256-bit hashes of copies differ in at most so many bits (the limit that PDQ recommends)",
        unit="bits",
    )
    near_memory_bytes: int = knob(1 << 30, "working memory of one search process", unit="bytes")

    def __post_init__(self) -> None:
        hash_check(np.zeros((0, _HASH_BYTES), np.uint8), self.near_verify_bits)
        self.search()

    def search(self) -> SearchConfig:
        """Settings of the search."""
        return SearchConfig(self.near_max_bits, self.near_memory_bytes)


@corpus_stage(
    NearDuplicatesConfig,
    reads=(*duplicates.READS, "phash", "phash256"),
    adds=duplicates.ADDS,
    rejects=tuple(reason for reason, _ in _REASONS),
    modules=(duplicates, library),
)
def near_duplicates(corpus: Corpus, settings: NearDuplicatesConfig) -> Iterator[Update]:
    """Keep one row per cluster of near-duplicates; see the module docstring."""
    total = int(corpus.starts()[-1])
    short, long = corpus.work / "phash.npy", corpus.work / "phash256.npy"
    _write_hashes(corpus, total, short, long)
    found = search(short, corpus.work / "search", settings.search(), corpus.map)
    check = hash_check(np.load(long, mmap_mode="r"), settings.near_verify_bits)
    order = duplicates.best_first(
        corpus, np.unique(np.concatenate([found.pairs["low"], found.pairs["high"]]))
    )
    representative, distance = star_clusters(found.pairs, order, check).for_all(total)
    yield from duplicates.merge(
        corpus,
        duplicates.Clusters(
            representative.astype(np.int64), np.zeros(total, np.uint8), distance.astype(np.int16), _REASONS
        ),
    )


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
