"""The keep rule, against Python's sort of tuples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates.keep import keep_order
from megatron_nucleus.utils.errors import ConfigError


def columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Few different values, so that every later key is needed."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (rows, 32), np.uint8)
    ids[:, : 8 * (seed % 4)] = 0  # ids that begin alike
    return {
        "licence_known": rng.random(rows) < 0.5,
        "pixels": rng.choice([1, 10**6, 2**40], rows),
        "score": rng.choice(np.array([-1, 5.5, 6.25, np.nan], np.float32), rows),
        "captions": rng.integers(0, 3, rows, np.int32),
        "ids": ids,
    }


@pytest.mark.parametrize("seed", range(4))
def test_order_is_that_of_the_rule(seed):
    table = columns(500, seed)

    def rank(row: int) -> tuple:
        score = float(table["score"][row])
        return (
            not table["licence_known"][row],
            -int(table["pixels"][row]),
            math.inf if math.isnan(score) else -score,
            -int(table["captions"][row]),
            table["ids"][row].tobytes(),
        )

    order = keep_order(**table)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(500), key=rank)
    as_void = table | {"ids": np.ascontiguousarray(table["ids"]).view("V32")[:, 0]}
    assert keep_order(**as_void).tolist() == order.tolist()


def test_order_does_not_depend_on_the_order_of_rows():
    table = columns(300, 1)
    shuffle = np.random.default_rng(0).permutation(300)
    shuffled = keep_order(**{name: column[shuffle] for name, column in table.items()})
    np.testing.assert_array_equal(shuffle[shuffled], keep_order(**table))


def test_no_rows():
    assert keep_order(**{name: column[:0] for name, column in columns(3, 0).items()}).tolist() == []


def test_other_columns_are_refused():
    table = columns(5, 0)
    with pytest.raises(ConfigError, match="score has 4 rows, licence_known 5"):
        keep_order(**table | {"score": table["score"][:4]})
    with pytest.raises(ConfigError, match=r"ids of uint8 \[5, 31\]; must be 32 bytes"):
        keep_order(**table | {"ids": table["ids"][:, :31]})
