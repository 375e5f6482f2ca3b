"""Blocks and tables: nothing within the distance can miss all keys, and moving a key keeps every bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates.keys import layout
from megatron_nucleus.utils.errors import ConfigError


def words(count: int, seed: int, bits: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, count, np.uint64)


def test_sixty_four_bits_at_distance_four():
    of = layout(4)
    assert sorted(width for _, width in of.blocks) == [9] * 6 + [10]
    assert len(of.tables) == 35
    lengths = [of.key_bits(table) for table in range(35)]
    assert (lengths.count(27), lengths.count(28)) == (20, 15)
    # By hand: 20 tables of 27 bits and 15 of 28 on 10^18 / 2 pairs.
    assert of.random_candidates(10**9) == pytest.approx(0.5e18 * (20 / 2**27 + 15 / 2**28), rel=1e-6)


@pytest.mark.parametrize(("distance", "bits"), [*((d, 64) for d in range(5)), (4, 37), (4, 8)])
def test_blocks_are_even_and_cover_every_bit_once(distance, bits):
    of = layout(distance, bits)
    covered = [bit for shift, width in of.blocks for bit in range(shift, shift + width)]
    assert sorted(covered) == list(range(bits))
    widths = [width for _, width in of.blocks]
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("distance", range(5))
def test_every_change_of_so_many_blocks_leaves_a_table(distance):
    of = layout(distance)
    for count in range(len(of.blocks) + 1):
        for changed in itertools.combinations(range(len(of.blocks)), count):
            untouched = [n for n, table in enumerate(of.tables) if not set(table) & set(changed)]
            first = of.first[sum(1 << block for block in changed)]
            assert first == (untouched[0] if untouched else len(of.tables))
            assert bool(untouched) == (count <= distance)


def test_first_table_looks_at_the_bits_of_the_blocks():
    of = layout(4)
    for block, (shift, width) in enumerate(of.blocks):
        ends = np.uint64(1) << np.array([shift, shift + width - 1], np.uint64)
        expected = next(n for n, table in enumerate(of.tables) if block not in table)
        assert of.first_table(ends).tolist() == [expected, expected]
    assert of.first_table(np.array([0], np.uint64)).tolist() == [0]


@pytest.mark.parametrize(("distance", "bits"), [(4, 64), (3, 64), (1, 64), (4, 37)])
def test_key_comes_to_the_front_and_back(distance, bits):
    of, values = layout(distance, bits), words(200, seed=1, bits=bits)
    for table, chosen in enumerate(of.tables):
        front = of.to_front(values, table)
        np.testing.assert_array_equal(of.from_front(front, table), values)
        text = [format(int(value), f"0{bits}b") for value in values]
        keys = [
            "".join(t[bits - s - w : bits - s] for s, w in (of.blocks[block] for block in chosen))
            for t in text
        ]
        assert [format(int(f), f"0{bits}b")[: of.key_bits(table)] for f in front] == keys
        np.testing.assert_array_equal(
            np.bitwise_count(front[1:] ^ front[:-1]), np.bitwise_count(values[1:] ^ values[:-1])
        )


@pytest.mark.parametrize("distance", [-1, 5, 64])
def test_other_distances_are_refused(distance):
    with pytest.raises(ConfigError, match=f"max_distance {distance}: must be 0 to 4"):
        layout(distance)
