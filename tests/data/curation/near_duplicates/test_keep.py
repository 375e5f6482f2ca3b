"""The keep rule, against Python's sort of tuples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates.keep import Candidates, keep_order
from megatron_nucleus.utils.errors import ConfigError


def candidates(rows: int, seed: int) -> Candidates:
    """Few different values, so that every later key is needed."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (rows, 32), np.uint8)
    ids[:, : 8 * (seed % 4)] = 0  # ids that begin alike
    return Candidates(
        licence_known=rng.random(rows) < 0.5,
        pixels=rng.choice([1, 10**6, 2**40], rows),
        score=rng.choice(np.array([-1, 5.5, 6.25, np.nan], np.float32), rows),
        colour=rng.random(rows) < 0.5,
        quality=rng.choice(np.array([25, 75, 90, 95, 100, np.nan], np.float32), rows),
        file_bytes=rng.choice([1, 10**5, 2**40], rows),
        sharpness=rng.choice(np.array([0.5, 40], np.float32), rows),
        captions=rng.integers(0, 3, rows, np.int32),
        ids=ids,
    )


def chosen(table: Candidates, rows: np.ndarray) -> Candidates:
    return Candidates(*(column[rows] for column in table))


@pytest.mark.parametrize("seed", range(4))
def test_order_is_that_of_the_rule(seed):
    table = candidates(4000, seed)

    def rank(row: int) -> tuple:
        score, quality = float(table.score[row]), float(table.quality[row])
        quality = 75.0 if math.isnan(quality) else 85.0 if 85 < quality < 100 else quality
        return (
            not table.licence_known[row],
            -int(table.pixels[row]),
            math.inf if math.isnan(score) else -score,
            not table.colour[row],
            -quality,
            0 if quality == 100 else -int(table.file_bytes[row]),
            -float(table.sharpness[row]),
            -int(table.captions[row]),
            table.ids[row].tobytes(),
        )

    order = keep_order(table)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(4000), key=rank)
    as_void = table._replace(ids=np.ascontiguousarray(table.ids).view("V32")[:, 0])
    assert keep_order(as_void).tolist() == order.tolist()


def test_order_does_not_depend_on_the_order_of_rows():
    table = candidates(300, 1)
    shuffle = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(shuffle[keep_order(chosen(table, shuffle))], keep_order(table))


def test_no_rows():
    assert keep_order(chosen(candidates(3, 0), np.empty(0, np.int64))).tolist() == []


def test_other_columns_are_refused():
    table = candidates(5, 0)
    with pytest.raises(ConfigError, match="score has 4 rows, licence_known 5"):
        keep_order(table._replace(score=table.score[:4]))
    with pytest.raises(ConfigError, match=r"ids of uint8 \[5, 31\]; must be 32 bytes"):
        keep_order(table._replace(ids=table.ids[:, :31]))
