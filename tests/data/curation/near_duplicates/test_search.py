"""The search of a corpus: every pair, the same bytes whatever the memory, the processes and the interruptions."""

from __future__ import annotations

import concurrent.futures
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates import partitions as partitions_module
from megatron_nucleus.data.curation.near_duplicates.partitions import PAIR
from megatron_nucleus.data.curation.near_duplicates.search import Found, SearchConfig, open_pairs, search
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.support import ROOT

MIB = 1 << 20


def corpus(rows: int, seed: int = 3) -> np.ndarray:
    """Random hashes; of each hundred rows some are equal to, or near, earlier ones."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    equal = rng.choice(rows, rows // 50, replace=False)
    hashes[equal] = hashes[rng.integers(0, rows, len(equal))]
    for row in rng.choice(rows, rows // 20, replace=False):
        changes = np.bitwise_or.reduce(
            np.uint64(1) << rng.choice(64, rng.integers(1, 7), replace=False).astype(np.uint64)
        )
        hashes[row] = hashes[rng.integers(0, rows)] ^ changes
    return hashes


def all_pairs(hashes: np.ndarray, distance: int) -> set[tuple[int, int, int]]:
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    rows = np.argwhere(np.triu(apart <= distance, 1))
    return {(int(i), int(j), int(apart[i, j])) for i, j in rows}


def spread(found: Found, rows: int) -> set[tuple[int, int, int]]:
    """All pairs of rows: equal hashes stand in for each other."""
    stands_for = np.arange(rows)
    equal = found.pairs[found.pairs["distance"] == 0]
    stands_for[equal["high"]] = equal["low"]
    members = {row: np.flatnonzero(stands_for == row).tolist() for row in set(stands_for.tolist())}
    pairs = {(a, b, 0) for rows in members.values() for a, b in itertools.combinations(rows, 2)}
    for low, high, distance in found.pairs[found.pairs["distance"] > 0].tolist():
        pairs |= {(min(a, b), max(a, b), distance) for a in members[low] for b in members[high]}
    return pairs


@pytest.mark.parametrize("distance", range(5))
def test_pairs_are_those_of_comparing_all_with_all(distance, tmp_path):
    hashes = corpus(1500)
    found = search(hashes, tmp_path, SearchConfig(distance))
    assert spread(found, len(hashes)) == all_pairs(hashes, distance)
    keys = found.pairs["low"].astype(np.int64) << 32 | found.pairs["high"]
    assert (np.diff(keys) > 0).all()
    assert (found.pairs["low"] < found.pairs["high"]).all()


def test_equal_hashes_are_paired_with_their_lowest_row(tmp_path):
    hashes = np.full(50, 12345, np.uint64)
    hashes[[7, 40]] ^= np.uint64(0b1011)
    pairs = search(hashes, tmp_path).pairs.tolist()
    rest = [row for row in range(1, 50) if row not in (7, 40)]
    assert pairs == sorted([(0, row, 0) for row in rest] + [(0, 7, 3), (7, 40, 0)])


def test_distance_four_is_found_and_five_is_not(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 2000, np.uint64)
    copies = []
    for count in (4, 5):
        flips = np.array([rng.choice(64, count, replace=False) for _ in base])
        copies.append(base ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), axis=1))
    pairs = search(np.concatenate([base, *copies]), tmp_path).pairs
    from_base = pairs[pairs["low"] < 2000]
    assert from_base.tolist() == [(row, 2000 + row, 4) for row in range(2000)]


@pytest.mark.parametrize("kind", ["spread", "one block", "two blocks"])
def test_memory_and_order_of_tasks_do_not_show_in_the_bytes(kind, tmp_path):
    """Also where hashes agree in the first blocks, so that partitions are too large and are taken in ranges."""
    hashes = corpus(60_000)
    hashes &= np.uint64(2**64 - 1 >> {"spread": 0, "one block": 9, "two blocks": 18}[kind])
    whole = search(hashes, tmp_path / "whole")
    assert whole.work.split_rows == 0
    assert len(whole.pairs) > 3000
    for name, tasks in (("forwards", lambda f, t: map(f, t)), ("backwards", lambda f, t: map(f, t[::-1]))):
        found = search(hashes, tmp_path / name, SearchConfig(memory_bytes=MIB), tasks)
        assert found.work.split_rows == 5 * len(hashes)
        assert found.work.split_bytes >= 5 * 12 * len(hashes)
        assert found.path.read_bytes() == whole.path.read_bytes()
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["pairs.npy", "plan.json", "work.json"]


def test_processes_and_every_kind_of_input_give_the_same_bytes(tmp_path):
    hashes = corpus(60_000)
    whole = search(hashes, tmp_path / "whole").path.read_bytes()
    (tmp_path / "pool").mkdir()
    np.save(tmp_path / "pool/hashes.npy", hashes)
    small = SearchConfig(memory_bytes=MIB)
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        found = search(tmp_path / "pool/hashes.npy", tmp_path / "pool", small, lambda f, t: pool.map(f, t))
    assert found.path.read_bytes() == whole
    mapped = np.load(tmp_path / "pool/hashes.npy", mmap_mode="r")
    assert search(mapped, tmp_path / "mapped", small).path.read_bytes() == whole
    assert np.array_equal(np.load(tmp_path / "pool/hashes.npy"), hashes)  # the caller's file stays


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("memory_bytes", [16 * MIB, 2 * MIB])
def test_memory_bound_holds(memory_bytes, equal, tmp_path):
    hashes = corpus(150_000)
    if equal:
        hashes[:75_000] = hashes[75_000:]
    np.save(tmp_path / "hashes.npy", hashes)
    del hashes
    tracemalloc.start()
    search(tmp_path / "hashes.npy", tmp_path / "work", SearchConfig(memory_bytes=memory_bytes))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < memory_bytes + MIB  # lists of paths and other small things


class Stop(Exception):
    pass


def stopping_after(count: int, done: list):
    """A map that runs ``count`` tasks in all and then fails."""

    def tasks(function, items):
        for item in items:
            if len(done) == count:
                raise Stop
            done.append(item)
            yield function(item)

    return tasks


@pytest.mark.parametrize("count", [0, 2, 10, 30, 54])
def test_interrupted_search_goes_on_and_repeats_no_task(count, tmp_path):
    hashes, config = corpus(60_000), SearchConfig(memory_bytes=MIB)
    whole = search(hashes, tmp_path / "whole").path.read_bytes()
    folder, done = tmp_path / "work", []
    with pytest.raises(Stop):
        search(hashes, folder, config, stopping_after(count, done))
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.part")}
    (folder / ".split-9-00000.part.tmp1").write_bytes(b"half")  # as a killed process leaves it

    def tasks(function, items):
        for item in items:
            yield function(item)
            assert all(p.stat().st_mtime_ns == time for p, time in finished.items() if p.exists())

    found = search(hashes, folder, config, tasks)
    assert found.path.read_bytes() == whole
    assert not list(folder.glob(".*"))


def test_lost_files_are_made_again(tmp_path):
    hashes, config = corpus(60_000), SearchConfig(memory_bytes=MIB)
    whole = search(hashes, tmp_path / "whole").path.read_bytes()
    folder = tmp_path / "work"
    with pytest.raises(Stop):
        search(hashes, folder, config, stopping_after(40, []))
    files = sorted(folder.glob("*.part"))
    for path in files[::3]:
        path.unlink()
    assert search(hashes, folder, SearchConfig(memory_bytes=2 * MIB)).path.read_bytes() == whole


def test_killed_search_goes_on(tmp_path):
    np.save(tmp_path / "hashes.npy", corpus(60_000))
    whole = search(tmp_path / "hashes.npy", tmp_path / "whole").path.read_bytes()
    code = """
import itertools, os, signal, sys
from megatron_nucleus.data.curation.near_duplicates import SearchConfig, search
left = itertools.count(int(sys.argv[2]), -1)
def tasks(function, items):
    for item in items:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield function(item)
search(sys.argv[1] + "/hashes.npy", sys.argv[1] + "/work", SearchConfig(memory_bytes=1 << 20), tasks)
"""
    for tasks in (5, 40):
        ended = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tasks)], cwd=ROOT, timeout=60)
        assert ended.returncode == -9
    assert (
        search(tmp_path / "hashes.npy", tmp_path / "work", SearchConfig(memory_bytes=MIB)).path.read_bytes()
        == whole
    )


def test_finished_search_is_only_opened(tmp_path):
    hashes = corpus(1000)
    first = search(hashes, tmp_path)
    stamp = first.path.stat().st_mtime_ns
    again = search(hashes, tmp_path, SearchConfig(memory_bytes=MIB))
    assert again.path.stat().st_mtime_ns == stamp
    assert again.work == first.work
    np.testing.assert_array_equal(open_pairs(again.path), first.pairs)


def test_planted_pairs_are_all_found(tmp_path):
    rows, planted = 200_000, 20_000
    rng = np.random.default_rng(8)
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    bits = np.argpartition(rng.random((planted, 64)), 4, axis=1)[:, :4].astype(np.uint64)
    count = rng.integers(1, 5, planted)
    flips = np.where(np.arange(4) < count[:, None], np.uint64(1) << bits, np.uint64(0))
    hashes[rows - planted :] = hashes[:planted] ^ np.bitwise_or.reduce(flips, axis=1)
    pairs = search(hashes, tmp_path).pairs
    planted_pairs = zip(range(planted), range(rows - planted, rows), count.tolist(), strict=True)
    assert set(planted_pairs) <= set(pairs.tolist())


def test_few_rows(tmp_path):
    for rows in range(3):
        found = search(np.arange(rows, dtype=np.uint64), tmp_path / str(rows))
        assert found.pairs.tolist() == ([(0, 1, 1)] if rows == 2 else [])
        assert found.pairs.dtype == PAIR


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        (np.zeros(3, np.int64), r"hashes: int64 \[3\]; must be uint64 \[rows\]"),
        (np.zeros((3, 2), np.uint64), r"hashes: uint64 \[3, 2\]"),
        ("/no/such.npy", "/no/such.npy: no such file"),
        (np.broadcast_to(np.uint64(0), 2**31), "2147483648 rows; at most 2147483647"),
    ],
)
def test_other_arrays_are_refused(hashes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        search(hashes, tmp_path)


def test_other_settings_are_refused():
    with pytest.raises(ConfigError, match="max_distance 5: must be 0 to 4 bits"):
        SearchConfig(5)
    with pytest.raises(ConfigError, match="memory_bytes 1000: must be at least 1048576"):
        SearchConfig(memory_bytes=1000)


def test_folder_of_another_search_is_refused(tmp_path):
    hashes = corpus(100)
    search(hashes, tmp_path)
    changed = hashes.copy()
    changed[50] ^= np.uint64(1)
    for other, config in (
        (changed, SearchConfig()),
        (hashes, SearchConfig(3)),
        (hashes[:99], SearchConfig()),
    ):
        with pytest.raises(ConfigError, match="holds the search of 100 other hashes or of another distance"):
            search(other, tmp_path, config)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty"])
@pytest.mark.parametrize("name", ["split-0-00001.part", "found-0-0003.part"])
def test_damaged_files_are_named(name, damage, tmp_path):
    hashes, config = corpus(60_000), SearchConfig(memory_bytes=MIB)
    with pytest.raises(Stop):
        search(hashes, tmp_path, config, stopping_after(10, []))
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "longer": whole + b"\0", "empty": b""}[damage])
    with pytest.raises(DataError, match=f"{name}: damaged .*; remove it and start again"):
        search(hashes, tmp_path, config)
    path.unlink()
    search(hashes, tmp_path, config)


def test_damaged_plan_and_hashes_are_named(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match="plan.json: damaged"):
        search(corpus(10), tmp_path)
    for damaged in (b"no array", b""):
        (tmp_path / "hashes.npy").write_bytes(damaged)
        with pytest.raises(DataError, match="hashes.npy: cannot be read as .npy"):
            search(tmp_path / "hashes.npy", tmp_path)


def test_more_rows_of_one_key_than_memory_are_refused_with_what_would_do(tmp_path):
    hashes = np.arange(40_000, dtype=np.uint64)
    needed = 40_000 * partitions_module.BYTES_PER_ROW
    with pytest.raises(DataError, match=f"40000 rows agree in 27 bits .* allow {needed} bytes"):
        search(hashes, tmp_path, SearchConfig(memory_bytes=MIB))
    found = search(hashes[::64], tmp_path / "fewer", SearchConfig(memory_bytes=MIB))
    assert spread(found, 625) == all_pairs(hashes[::64], 4)
