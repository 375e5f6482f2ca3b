"""Keyed permutations: bijections that look random, position by position."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.permutation import permute


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 1000, 1024, 4097])
def test_permutation_is_a_bijection(count):
    for key in range(5):
        assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


def test_permutation_works_position_by_position():
    whole = permute(np.arange(1000), 1000, 42)
    some = np.array([0, 999, 500, 7])
    assert (permute(some, 1000, 42) == whole[some]).all()


def test_permutations_look_random():
    count, keys = 64, 400
    table = np.stack([permute(np.arange(count), count, key) for key in range(keys)])
    # Every position should take every value about keys / count = 6.25 times (chi-square over 64 x 64 cells).
    cells = np.zeros((count, count))
    for position in range(count):
        cells[position] = np.bincount(table[:, position], minlength=count)
    chi_square = ((cells - keys / count) ** 2 / (keys / count)).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5
    large = permute(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(np.arange(100_000), large)[0, 1]) < 0.02
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
