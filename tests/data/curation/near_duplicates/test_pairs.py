"""Pairs of hashes in memory: the same as comparing all with all, each once, with bounded work on hot keys."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates import pairs as pairs_module
from megatron_nucleus.data.curation.near_duplicates.keys import layout
from megatron_nucleus.data.curation.near_duplicates.pairs import Work, near_pairs


def flipped(values: np.ndarray, bits: int, rng: np.random.Generator, among: int = 64) -> np.ndarray:
    """Copies with exactly ``bits`` different bits changed, all of them among the lowest ``among``."""
    out = values.copy()
    for row in range(len(out)):
        for bit in rng.choice(among, bits, replace=False):
            out[row] ^= np.uint64(1) << np.uint64(bit)
    return out


def brute(values: np.ndarray, distance: int) -> set[tuple[int, int]]:
    values = np.sort(values)
    apart = np.bitwise_count(values[:, None] ^ values[None, :])
    return {
        (int(values[i]), int(values[j]))
        for i, j in zip(*np.nonzero(np.triu(apart <= distance, 1)), strict=True)
    }


def listed(values: np.ndarray, distance: int, work: Work | None = None, **options) -> list[tuple[int, int]]:
    found = near_pairs(values, distance, Work() if work is None else work, **options)
    return [pair for a, b in found for pair in zip(a.tolist(), b.tolist(), strict=True)]


def crowd(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    centres = rng.integers(0, 2**64, 30, np.uint64)
    if kind == "random":
        values = [rng.integers(0, 2**64, 800, np.uint64)]
    elif kind == "clustered":
        values = [flipped(np.repeat(centres, 5), bits, rng) for bits in range(7)]
    elif kind == "hot key":  # one key of the first table, and near pairs among its rows
        few = rng.integers(0, 2**20, 400, np.uint64) | np.uint64(0x5A5 << 52)
        values = [few, flipped(few[:200], 2, rng, among=20), flipped(few[:100], 4, rng, among=37)]
    else:  # ball: every two are near in most of the tables
        assert kind == "ball"
        ones = np.uint64(1) << np.arange(64, dtype=np.uint64)
        values = [np.zeros(1, np.uint64), ones, (ones[:20, None] | ones[None, 20:40]).ravel()]
    return np.unique(np.concatenate(values))


@pytest.mark.parametrize("distance", range(5))
@pytest.mark.parametrize("kind", ["random", "clustered", "hot key", "ball"])
@pytest.mark.parametrize("hot_rows", [3, 256])
def test_pairs_are_those_of_comparing_all_with_all_each_once(kind, distance, hot_rows):
    values = crowd(kind)
    found = listed(values, distance, hot_rows=hot_rows)
    assert len(found) == len(set(found))
    assert set(found) == brute(values, distance)


def test_steps_of_any_size_give_the_same_pairs(monkeypatch):
    values = crowd("clustered")
    expected = listed(values, 4)
    monkeypatch.setattr(pairs_module, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(pairs_module, "_BATCH_PAIRS", 1)
    for hot_rows in (3, 256):
        assert sorted(listed(values, 4, hot_rows=hot_rows)) == sorted(expected)


def test_tables_share_the_pairs_among_them():
    values = crowd("clustered")
    of = layout(4)
    by_table = [listed(values, 4, tables=[table]) for table in range(len(of.tables))]
    assert sum(map(len, by_table)) == len(brute(values, 4))
    for table, some in enumerate(by_table):
        differences = np.array([a ^ b for a, b in some], np.uint64)
        assert (of.first_table(differences) == table).all()


def test_hot_key_is_searched_by_its_other_bits():
    """30,000 rows share a key: 4.5e8 pairs, of which tables over the other 37 bits leave less than one in 100."""
    rng = np.random.default_rng(2)
    values = rng.integers(0, 2**37, 30_000, np.uint64)
    near = flipped(values[:300], 4, rng, among=37)
    planted = {(min(a, b), max(a, b)) for a, b in zip(values[:300].tolist(), near.tolist(), strict=True)}
    values = np.unique(np.concatenate([values, near]))
    work = Work()
    found = set(listed(values, 4, work, tables=[0]))
    assert planted <= found
    assert work.candidates == len(values) * (len(values) - 1) // 2
    assert work.compared < work.candidates / 100
    for value in near[:100]:  # and whatever else is near these
        apart = np.bitwise_count(values ^ value)
        others = values[(apart > 0) & (apart <= 4)].tolist()
        assert {(min(int(value), other), max(int(value), other)) for other in others} <= found


def test_crowded_run_is_compared_as_squares_of_bounded_size(monkeypatch):
    """All numbers below 2^12 share 52 bits, and no table tells them apart well: squares, in pieces."""
    values = np.arange(1 << 12, dtype=np.uint64)
    squares = []
    count = np.bitwise_count
    monkeypatch.setattr(pairs_module.np, "bitwise_count", lambda x: (squares.append(x.size), count(x))[1])
    found = listed(values, 1, tables=[0])
    monkeypatch.undo()
    assert len(found) == 12 * (1 << 12) // 2 == len(set(found))  # each number has 12 neighbours at distance 1
    assert max(squares) <= 512 * 512


def test_nothing_comes_of_nothing():
    assert listed(np.zeros(0, np.uint64), 4) == []
    assert listed(np.array([7], np.uint64), 4) == []


@pytest.mark.parametrize(("rows", "tables"), [(1_000_000, [0, 7, 20, 34]), (5_000_000, [0, 34])])
def test_random_hashes_give_as_many_candidates_as_the_formula_says(rows, tables):
    """A pair agrees in a table with probability 2^-bits; counts of rare, nearly independent pairs are Poisson."""
    of, work = layout(4), Work()
    values = np.random.default_rng(rows).integers(0, 2**64, rows, np.uint64)
    listed(values, 4, work, tables=tables)
    expected = sum(rows * (rows - 1) / 2 * 2.0 ** -of.key_bits(table) for table in tables)
    assert abs(work.candidates - expected) < 5 * expected**0.5
    assert work.row_tables == rows * len(tables)
