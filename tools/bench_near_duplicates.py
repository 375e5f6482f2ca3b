"""Search random hashes with planted near-duplicates, count those that were found, and forecast a larger search.

Every memory bound is a run in a process of its own, so that peak memory is that of one run; the bound covers the
working arrays, the peak also the interpreter, its libraries and mapped files. Example:

  tools/bench_near_duplicates.py --rows 5000000 --planted 400000 --memory-bytes 1073741824 134217728 \\
      --output benchmarks/near_duplicates.json
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_nucleus.data.curation import near_duplicates
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_json_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

MAX_DISTANCE = near_duplicates.SearchConfig.max_distance


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="tools/bench_near_duplicates.py", description=__doc__)
    parser.add_argument(
        "--rows", default="5000000", metavar="N", help="hashes, the planted ones included [5000000]"
    )
    parser.add_argument(
        "--planted", default="400000", metavar="N",
        help="near-duplicates among them: copies of other rows with 1 to 4 bits changed [400000]",
    )  # fmt: skip
    parser.add_argument(
        "--memory-bytes", nargs="+", default=["1073741824"], metavar="N",
        help="working memory of a search; a run for each [1073741824]",
    )  # fmt: skip
    parser.add_argument(
        "--forecast-rows", default="1e9", metavar="N", help="size of the search to forecast [1e9]"
    )
    parser.add_argument("--seed", default="0", metavar="N", help="of the hashes [0]")
    parser.add_argument("--work-folder", metavar="FOLDER", help="for temporary files [the system's]")
    parser.add_argument("--output", metavar="FILE", help="JSON file to write")
    cli.add_json_flag(parser)
    args = parser.parse_args(words)
    rows, planted = _at_least(args.rows, 2, "--rows"), _at_least(args.planted, 0, "--planted")
    if 2 * planted > rows:
        raise ConfigError(f"--planted {planted}: must be at most half of --rows {rows}, a copy for a row")
    bounds = [_at_least(bound, 1 << 20, "--memory-bytes") for bound in args.memory_bytes]
    forecast_rows = _at_least(args.forecast_rows, 2, "--forecast-rows")
    seed = _at_least(args.seed, 0, "--seed")
    for flag, folder in (
        ("--work-folder", args.work_folder),
        ("--output", args.output and Path(args.output).parent),
    ):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{flag}: no such folder {folder}; create it first")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(measure, (rows, planted, seed, bound, args.work_folder)) for bound in bounds]
        for run in runs:
            print(_line(run))
        rates = pool.apply(sample, (forecast_rows, args.work_folder))
    numbers = near_duplicates.forecast(forecast_rows, near_duplicates.Rates(**rates))
    print(near_duplicates.forecast_text(numbers))
    report = {
        "hardware": hardware(),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": shlex.join(["tools/bench_near_duplicates.py", *words]),
        "runs": runs,
        "rates": rates,
        "forecast": numbers,
    }
    if args.output:
        write_json_atomic(args.output, report)
    if args.json:
        cli.print_json(report)


def _at_least(raw: str, least: int, flag: str) -> int:
    value = coerce(raw, int, flag)
    if value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}")
    return value


def _line(run: dict) -> str:
    return (
        f"{run['rows']:,} hashes in {run['wall_s']:.1f} s ({run['user_cpu_s']:.1f} s of CPU), bound "
        f"{run['memory_bytes'] / 2**20:.0f} MiB, peak {run['peak_rss_bytes'] / 2**20:.0f} MiB: "
        f"{run['planted_found']:,} of {run['planted']:,} planted found, {run['pairs']:,} pairs, "
        f"{run['candidates']:,} candidates ({run['random_candidates']:,.0f} expected of random hashes)"
    )


def corpus(rows: int, planted: int, seed: int) -> np.ndarray:
    """uint64 [rows]: random, the last ``planted`` of them copies of the first with 1 to 4 different bits changed."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    bits = rng.integers(0, 64, (planted, MAX_DISTANCE), np.uint8)
    while len(again := np.flatnonzero((np.diff(np.sort(bits, axis=1), axis=1) == 0).any(1))):
        bits[again] = rng.integers(0, 64, (len(again), MAX_DISTANCE), np.uint8)
    changes = rng.integers(1, MAX_DISTANCE + 1, planted)
    copies = hashes[:planted].copy()
    for number in range(MAX_DISTANCE):
        copies ^= (changes > number).astype(np.uint64) << bits[:, number].astype(np.uint64)
    hashes[rows - planted :] = copies
    return hashes


def measure(rows: int, planted: int, seed: int, memory_bytes: int, work_folder: str | None) -> dict:
    """Make the corpus on disk, search it, and say what that took."""
    with tempfile.TemporaryDirectory(dir=work_folder) as folder:
        path = Path(folder) / "hashes.npy"
        np.save(path, corpus(rows, planted, seed))
        start_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        config = near_duplicates.SearchConfig(MAX_DISTANCE, memory_bytes)
        found = near_duplicates.search(path, Path(folder) / "search", config)
        wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_SELF)
        key = found.pairs["low"].astype(np.int64) << 32 | found.pairs["high"]  # ascending, as the pairs are
        wanted = np.arange(planted, dtype=np.int64) << 32 | np.arange(rows - planted, rows)
        hits = np.isin(wanted, key, assume_unique=True)
        return {
            "rows": rows,
            "planted": planted,
            "planted_found": int(hits.sum()),
            "pairs": len(found.pairs),
            "memory_bytes": memory_bytes,
            "wall_s": wall_s,
            "user_cpu_s": after.ru_utime - before.ru_utime,
            "system_cpu_s": after.ru_stime - before.ru_stime,
            "peak_rss_bytes": peak_rss_bytes(),
            "candidates": found.work.candidates,
            "random_candidates": near_duplicates.layout(MAX_DISTANCE).random_candidates(rows),
            "work": dataclasses.asdict(found.work),
        }


def sample(rows: int, work_folder: str | None) -> dict:
    """`near_duplicates.sample_rates` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=work_folder) as folder:
        return near_duplicates.sample_rates(folder, rows)._asdict()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process (Linux). `utils.memory` would load torch first, which is larger than all
    that is measured here."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    cli.run(main)
