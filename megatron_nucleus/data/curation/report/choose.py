"""Which images the report shows: those with the smallest ids.

An id is a hash of the content, so the smallest ones are a fair draw that depends neither on the order of the input
nor on the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_nucleus.data.index import TIERS

KEPT_EXAMPLES, TIER_EXAMPLES, REASON_EXAMPLES = 24, 8, 8
MAX_REASONS = 30  # reasons with pictures, the most frequent ones; own choice, keeps the page small
CLUSTERS, COPIES_PER_CLUSTER = 12, 4
EXACT = "exact_duplicate"
MAX_PICTURES = (
    KEPT_EXAMPLES
    + (len(TIERS) + 1) * TIER_EXAMPLES
    + MAX_REASONS * REASON_EXAMPLES
    + CLUSTERS * (1 + COPIES_PER_CLUSTER)
)


class Place(NamedTuple):
    """A kept row: part and position in it."""

    part: str
    position: int


class _Smallest:
    """The ``limit`` entries with the smallest keys of those that were offered."""

    def __init__(self, limit: int):
        self.limit = limit
        self._found: list[tuple[Any, Any]] = []

    def add(self, entries: Iterable[tuple[Any, Any]]) -> None:
        """Offer (key, entry) pairs; keys are different."""
        self._found = sorted([*self._found, *entries], key=lambda pair: pair[0])[: self.limit]

    def entries(self) -> list[Any]:
        """In the order of their keys."""
        return [entry for _, entry in self._found]


class Choice:
    """Fills with what is to be shown, part by part.

    Attributes:
        copies: id of a copy -> row of the quarantine; filled by `find_copies`.
    """

    def __init__(self) -> None:
        self._kept = _Smallest(KEPT_EXAMPLES)
        self._tiers: dict[str | None, _Smallest] = {}
        self._reasons: dict[tuple[int, str], _Smallest] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._large, self._far = _Smallest(CLUSTERS), _Smallest(CLUSTERS)
        self.copies: dict[tuple[str, str | None], dict[str, Any]] = {}

    def add_kept(self, part: str, table: pa.Table) -> None:
        """table: position, id, item, tier and perhaps duplicates of the kept rows of a part."""
        self._kept.add(_smallest_ids(part, table, KEPT_EXAMPLES))
        for tier in (None, *TIERS):
            chosen = pc.is_null(table["tier"]) if tier is None else pc.equal(table["tier"], tier)
            of_tier = table.filter(chosen)
            if len(of_tier):
                found = self._tiers.setdefault(tier, _Smallest(TIER_EXAMPLES))
                found.add(_smallest_ids(part, of_tier, TIER_EXAMPLES))
        if "duplicates" in table.column_names:
            self._add_clusters(part, table.filter(pc.greater(pc.list_value_length(table["duplicates"]), 0)))

    def _add_clusters(self, part: str, table: pa.Table) -> None:
        """Clusters with more than exact copies: the largest, and those with the most different copy."""
        for row in table.select(["position", "id", "duplicates"]).to_pylist():
            pictured = [d for d in row["duplicates"] if d["relation"] != EXACT]
            if pictured:
                place = Place(part, row["position"])
                far = max(-1 if d["distance"] is None else d["distance"] for d in pictured)
                wanted = [(d["source_id"], d["id"]) for d in shown_copies(row["duplicates"])]
                self._large.add([((-len(pictured), row["id"]), (place, wanted))])
                self._far.add([((-far, row["id"]), (place, wanted))])

    def add_dropped(self, level: int, table: pa.Table) -> None:
        """table: `store.DROPPED_SCHEMA` of the rows of a part that ended in a stage."""
        reasons = np.array(table["reason"].to_pylist(), dtype=object)
        for reason in sorted(set(reasons.tolist())):
            at = np.flatnonzero(reasons == reason)
            key = (level, reason)
            self._counts[key] = self._counts.get(key, 0) + len(at)
            chosen = table.take(pa.array(at)).select(["item", "sha256"]).to_pylist()
            keys = [(row["sha256"] or _hash(row["item"]), row["item"]) for row in chosen]
            best = sorted(range(len(at)), key=keys.__getitem__)[:REASON_EXAMPLES]
            rows = table.take(pa.array(at[best])).to_pylist()
            found = self._reasons.setdefault(key, _Smallest(REASON_EXAMPLES))
            found.add((keys[i], row) for i, row in zip(best, rows, strict=True))

    def find_copies(
        self, dropped: Callable[[str], Iterator[tuple[int, pa.Table]]], parts: Sequence[str]
    ) -> None:
        """Find where the bytes of the copies in the shown clusters lie."""
        wanted = {copy for _, copies in self._clusters() for copy in copies}
        names = pa.array(sorted({name for name, _ in wanted}), pa.string())
        for part in parts if wanted else ():
            for _, table in dropped(part):
                for row in table.filter(pc.is_in(table["item"], value_set=names)).to_pylist():
                    if (row["item"], row["sha256"]) in wanted:
                        self.copies[row["item"], row["sha256"]] = row

    def kept(self) -> list[Place]:
        """Of all kept images."""
        return self._kept.entries()

    def tiers(self) -> dict[str | None, list[Place]]:
        """Of each tier that has images; None: without one, when there are tiers at all."""
        if not any(tier in self._tiers for tier in TIERS):
            return {}
        return {tier: self._tiers[tier].entries() for tier in (*TIERS, None) if tier in self._tiers}

    def reasons(self) -> dict[tuple[int, str], list[dict[str, Any]]]:
        """(number of the stage, reason) -> rows of the quarantine; of the most frequent reasons, by stage."""
        ordered = sorted(self._reasons, key=lambda key: (-self._counts[key], key))[:MAX_REASONS]
        return {key: self._reasons[key].entries() for key in sorted(ordered, key=lambda key: key[0])}

    def clusters(self) -> list[Place]:
        """Of the clusters to show: half of them the largest, the others those whose copies differ most."""
        return [place for place, _ in self._clusters()]

    def _clusters(self) -> list[tuple[Place, list[tuple[str, str | None]]]]:
        half = CLUSTERS // 2
        large, far = self._large.entries(), self._far.entries()
        shown = large[:half]
        shown += [entry for entry in far if entry[0] not in {place for place, _ in shown}][: CLUSTERS - half]
        rest = [entry for entry in large if entry[0] not in {place for place, _ in shown}]
        return shown + rest[: CLUSTERS - len(shown)]


def shown_copies(duplicates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The copies of a cluster that get a picture: none of the same bytes, the most different first."""
    pictured = [d for d in duplicates if d["relation"] != EXACT]

    def order(copy: dict[str, Any]) -> tuple[int, str, str]:
        return (
            -(-1 if copy["distance"] is None else copy["distance"]),
            copy["id"] or "",
            copy["source_id"] or "",
        )

    return sorted(pictured, key=order)[:COPIES_PER_CLUSTER]


def _smallest_ids(part: str, table: pa.Table, limit: int) -> list[tuple[Any, Place]]:
    keys = [("id", "ascending"), ("item", "ascending")]
    best = table.select(["position", "id", "item"]).sort_by(keys).slice(0, limit).to_pylist()
    return [((row["id"], row["item"]), Place(part, row["position"])) for row in best]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
