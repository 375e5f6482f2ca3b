"""tools/bench_near_duplicates.py: the planted corpus, and a small run that ends with its file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_nucleus.utils.errors import ConfigError
from tests.support import ROOT
from tools import bench_near_duplicates


def test_copies_differ_in_one_to_four_bits():
    hashes = bench_near_duplicates.corpus(5000, 2000, seed=3)
    apart = np.bitwise_count(hashes[:2000] ^ hashes[3000:])
    counts = np.bincount(apart, minlength=6)
    assert counts[0] == counts[5] == 0
    assert (counts[1:5] > 400).all()  # a quarter each, give or take
    assert counts.sum() == 2000
    np.testing.assert_array_equal(hashes, bench_near_duplicates.corpus(5000, 2000, seed=3))


def test_a_small_run(tmp_path):
    output = tmp_path / "near_duplicates.json"
    words = [
        "tools/bench_near_duplicates.py",
        "--rows",
        "60000",
        "--planted",
        "5000",
        "--memory-bytes",
        "1e9",
        "1048576",
    ]
    words += ["--forecast-rows", "1e7", "--output", str(output), "--json"]
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    *lines, last = ended.stdout.splitlines()
    report = json.loads(output.read_text())
    assert json.loads(last) == report
    assert [run["memory_bytes"] for run in report["runs"]] == [10**9, 1 << 20]
    for run in report["runs"]:
        assert run["planted_found"] == run["planted"] == run["pairs"] == 5000
        assert run["candidates"] > run["random_candidates"] == pytest.approx(0.5 * 6e4**2 * 2.05e-7, rel=0.01)
        assert run["peak_rss_bytes"] < 150 << 20
    assert [run["work"]["split_rows"] for run in report["runs"]] == [0, 5 * 60000]
    assert "5,000 of 5,000 planted found" in lines[0]
    assert lines[2].startswith("10,000,000 hashes, distance <= 4 of 64 bits, 35 tables, 512 partitions")
    assert report["forecast"]["rows"] == 10**7
    assert report["command"] == " ".join(words)
    assert "cores" in report["hardware"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1"], "--rows 1: must be at least 2"),
        (["--rows", "100", "--planted", "51"], "--planted 51: must be at most half of --rows 100"),
        (["--memory-bytes", "1000"], "--memory-bytes 1000: must be at least 1048576"),
        (["--output", "/no/such/folder/x.json"], "--output: no such folder /no/such/folder"),
        (["--row", "3"], "unknown argument --row"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        bench_near_duplicates.main(arguments)
