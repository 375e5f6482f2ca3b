"""Forecasts: arithmetic by hand, rates from a real sample."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates.forecast import (
    Rates,
    forecast,
    forecast_text,
    rates_of,
    sample_rates,
)
from megatron_nucleus.data.curation.near_duplicates.pairs import Work
from megatron_nucleus.data.curation.near_duplicates.search import SearchConfig, search
from megatron_nucleus.utils.errors import ConfigError

RATES = Rates(split_s=36e-9, load_s=72e-9, sort_s=36e-9, compare_s=7.2e-9)


def test_a_billion_by_hand():
    numbers = forecast(10**9, RATES)
    assert numbers["candidates"] == pytest.approx(1.02e11, rel=0.01)
    assert numbers["split_core_hours"] == pytest.approx(5 * 1e9 * 36e-9 / 3600)  # 0.05
    assert numbers["load_core_hours"] == pytest.approx(0.1)
    assert numbers["sort_core_hours"] == pytest.approx(0.35)
    assert numbers["compare_core_hours"] == pytest.approx(numbers["candidates"] * 2e-12)
    assert numbers["core_hours"] == pytest.approx(0.05 + 0.1 + 0.35 + 0.2049, abs=1e-3)
    assert numbers["temporary_bytes"] == 20e9
    assert numbers["memory_per_worker_bytes"] == 40e9 / 512
    assert numbers["clusters_bytes"] == 5e9
    text = forecast_text(numbers)
    assert "1,000,000,000 hashes, distance <= 4 of 64 bits, 35 tables, 512 partitions" in text
    assert "0.70 core-hours: sort 0.35, compare 0.20 (1e+11 candidates), load 0.10, split 0.05" in text
    assert "20 GB of temporary files, 78.1 MB per worker, 5 GB for" in text


def test_rows_count_once_and_pairs_by_their_square():
    one, ten = forecast(10**8, RATES), forecast(10**9, RATES)
    for name in ("split_core_hours", "load_core_hours", "sort_core_hours", "memory_per_worker_bytes"):
        assert ten[name] == pytest.approx(10 * one[name])
    assert ten["candidates"] == pytest.approx(100 * one["candidates"], rel=1e-6)
    crowded = forecast(10**9, RATES, candidates_over_random=3)
    assert crowded["compare_core_hours"] == pytest.approx(3 * ten["compare_core_hours"])
    assert crowded["sort_core_hours"] == ten["sort_core_hours"]


def test_rates_are_times_by_counts(tmp_path):
    work = Work(
        row_tables=70, sort_s=7.0, compared=40, compare_s=2.0, load_s=1.0, loaded_rows=10, split_s=3.0, split_rows=6
    )  # fmt: skip
    assert rates_of(work) == Rates(0.5, 0.1, 0.1, 0.05)
    hashes = np.random.default_rng(0).integers(0, 2**64, 60_000, np.uint64)
    found = search(hashes, tmp_path, SearchConfig(memory_bytes=1 << 20))
    assert all(rate > 0 for rate in rates_of(found.work))
    with pytest.raises(ConfigError, match="no rates from"):
        rates_of(Work())


def test_sample_is_a_partition_of_the_search_to_come(tmp_path):
    """2^15 rows that agree in 9 bits give 15 tables, and rates of a plausible size."""
    rates = sample_rates(tmp_path, rows=512 << 15)
    assert all(1e-10 < rate < 1e-3 for rate in rates)
    assert np.load(tmp_path / "sample.npy").max() < 1 << 55
