"""Clusters: the plain rule row by row is the reference; no chains, no influence of the order of pairs."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates import clusters as clusters_module
from megatron_nucleus.data.curation.near_duplicates.clusters import components, star_clusters
from megatron_nucleus.data.curation.near_duplicates.partitions import PAIR
from megatron_nucleus.data.curation.near_duplicates.search import search
from megatron_nucleus.utils.errors import ConfigError


def pairs_of(*pairs: tuple[int, int, int]) -> np.ndarray:
    return np.array(list(pairs), PAIR)


def near_hashes(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Walks away from a few centres, a bit at a time, some of them within a few bits so that hashes repeat."""
    centres = rng.integers(0, 2**64, max(1, rows // 15), np.uint64)
    hashes = centres[rng.integers(0, len(centres), rows)]
    among = rng.choice([8, 64])
    for _ in range(rng.integers(0, 6)):
        flips = np.uint64(1) << rng.integers(0, among, rows, np.uint64)
        hashes = np.where(rng.random(rows) < 0.5, hashes ^ flips, hashes)
    return hashes


def plain_rule(hashes: np.ndarray, order: np.ndarray, holds: np.ndarray) -> list[int]:
    """Representative of each row, from all pairs of rows, one row after the other."""
    kept: list[int] = []
    stands_for = [-1] * len(hashes)
    for row in order.tolist():
        near = [k for k in kept if (int(hashes[row]) ^ int(hashes[k])).bit_count() <= 4 and holds[row, k]]
        stands_for[row] = near[0] if near else row
        if not near:
            kept.append(row)
    return stands_for


@pytest.mark.parametrize("share", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("seed", range(8))
def test_clusters_are_those_of_the_plain_rule(seed, share, tmp_path, monkeypatch):
    """Also with a check, which may hold for some rows of a hash and not for others of the same hash."""
    if seed % 2:
        monkeypatch.setattr(clusters_module, "_CHUNK_PAIRS", 20)
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 150))
    hashes, order = near_hashes(rows, rng), rng.permutation(rows)
    holds = rng.random((rows, rows)) < share
    holds &= holds.T
    pairs = search(hashes, tmp_path).pairs
    found = star_clusters(rng.permutation(pairs), order, None if share == 1 else lambda a, b: holds[a, b])
    representative, distance = found.for_all(rows)
    assert representative.tolist() == plain_rule(hashes, order, holds)
    np.testing.assert_array_equal(distance, np.bitwise_count(hashes ^ hashes[representative]))
    assert (representative.dtype, distance.dtype) == (np.int32, np.uint8)


def test_every_dropped_row_is_near_the_row_that_stands_for_it(tmp_path):
    """At 30,000 rows, by properties: representatives stand for themselves, are near none of each other, and the rest
    is near its own. Any order of the pairs gives the same."""
    rng = np.random.default_rng(1)
    hashes = near_hashes(30_000, rng)
    pairs = search(hashes, tmp_path).pairs
    order = rng.permutation(30_000)
    found = star_clusters(pairs, order)
    representative, distance = found.for_all(30_000)
    kept = np.flatnonzero(representative == np.arange(30_000))
    np.testing.assert_array_equal(representative[representative], representative)
    assert distance.max() <= 4
    np.testing.assert_array_equal(distance, np.bitwise_count(hashes ^ hashes[representative]))
    rank = np.empty(30_000, np.int64)
    rank[order] = np.arange(30_000)
    assert (rank[representative] <= rank).all()
    assert len(search(hashes[kept], tmp_path / "kept").pairs) == 0
    again = star_clusters(rng.permutation(pairs), order)
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
    assert 0 < len(kept) < 30_000


def test_no_chain_through_a_row_that_is_dropped():
    """1 is near 0, 2 near 1, 3 near 2: 1 goes, and 2 stays although it is near 1, which is near 0."""
    pairs = pairs_of((0, 1, 3), (1, 2, 4), (2, 3, 2))
    found = star_clusters(pairs, np.arange(4))
    assert found.representative.tolist() == [0, 0, 2, 2]
    assert found.distance.tolist() == [0, 3, 0, 2]
    assert star_clusters(pairs, np.array([1, 0, 2, 3])).representative.tolist() == [1, 1, 1, 3]


def test_the_best_representative_wins_also_when_it_is_known_later():
    """5 leads at once and takes 9; 3 becomes a representative a round later, is better, and takes 9 over."""
    pairs = pairs_of((1, 2, 1), (2, 3, 1), (3, 9, 4), (5, 9, 1))
    found = star_clusters(pairs, np.array([1, 2, 3, 5, 9]))
    assert found.row.tolist() == [1, 2, 3, 5, 9]
    assert found.representative.tolist() == [1, 1, 3, 5, 3]
    assert found.distance.tolist() == [0, 1, 0, 0, 4]


def test_equal_hashes_are_as_near_as_the_row_that_was_paired():
    """Rows 4 and 6 equal row 2, which is near 8: all three join 8 where 8 is best, and 8 joins 6 where that is."""
    pairs = pairs_of((2, 4, 0), (2, 6, 0), (2, 8, 3))
    assert star_clusters(pairs, np.array([8, 6, 4, 2])).representative.tolist() == [8, 8, 8, 8]
    found = star_clusters(pairs, np.array([6, 2, 4, 8]))
    assert found.representative.tolist() == [6, 6, 6, 6]
    assert found.distance.tolist() == [0, 0, 0, 3]


def test_check_is_asked_about_rows_and_representatives_only():
    """2,000 near copies of one image: its 2 million pairs are none of the 1,999 that decide."""
    rows = 2000
    pairs = np.zeros(rows * (rows - 1) // 2, PAIR)
    pairs["low"], pairs["high"] = np.triu_indices(rows, 1)
    pairs["distance"] = 2
    asked = []

    def check(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        asked.append(len(a))
        assert (a == 7).all()
        return np.ones(len(a), bool)

    order = np.concatenate([[7], np.arange(7), np.arange(8, rows)])
    assert (star_clusters(pairs, order, check).representative == 7).all()
    assert sum(asked) == rows - 1


def test_a_long_chain_and_a_star():
    rows = 3000
    chain = pairs_of(*((row, row + 1, 1) for row in range(rows - 1)))
    found = star_clusters(chain, np.arange(rows))
    assert found.representative.tolist() == [row - row % 2 for row in range(rows)]
    star = pairs_of(*((0, row, 1) for row in range(1, rows)))
    assert (star_clusters(star, np.arange(rows)).representative == 0).all()
    last = star_clusters(star, np.arange(rows)[::-1]).representative
    assert last.tolist() == [rows - 1, *range(1, rows)]


def test_no_pairs():
    found = star_clusters(np.zeros(0, PAIR), np.zeros(0, np.int64))
    representative, distance = found.for_all(3)
    assert (representative.tolist(), distance.tolist()) == ([0, 1, 2], [0, 0, 0])


def test_order_must_name_every_row_of_a_pair_once():
    pairs = pairs_of((1, 5, 2))
    assert star_clusters(pairs, np.array([0, 5, 3, 1, 9])).representative.tolist() == [5, 5]
    with pytest.raises(ConfigError, match="best_first names row 5 0 times"):
        star_clusters(pairs, np.array([1, 2]))
    with pytest.raises(ConfigError, match="best_first names row 1 2 times"):
        star_clusters(pairs, np.array([1, 5, 1]))


@pytest.mark.parametrize("seed", range(6))
def test_components_are_those_of_plain_union_find(seed, monkeypatch):
    monkeypatch.setattr(clusters_module, "_CHUNK_PAIRS", 64)
    rng = np.random.default_rng(seed)
    count = 700
    a, b = rng.integers(0, count, (2, (50, 350, 700)[seed % 3]))
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        low, high = sorted((root(x), root(y)))
        parent[high] = low
    found = components(count, a, b)
    assert found.dtype == np.int32
    assert found.tolist() == [root(node) for node in range(count)]


def test_components_of_a_path_in_any_order():
    names = np.random.default_rng(0).permutation(20_000)
    assert (components(20_000, names[:-1], names[1:]) == 0).all()
    assert components(3, np.zeros(0, np.int32), np.zeros(0, np.int32)).tolist() == [0, 1, 2]
