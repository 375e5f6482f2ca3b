"""tools/bench_scale.py: turns, medians, the file, and real launches of torchrun that end with it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_nucleus.utils.errors import ConfigError, UserError
from tests.launch.runs import marked_environment, processes_with
from tests.support import ROOT
from tests.tools.test_bench_train import FAST
from tools import bench_scale


def result(step_s: float) -> dict:
    figures = {"all_to_all_bytes_per_rank_per_step": 7, "peak_memory_bytes": 9}
    return {"step_s": step_s, "samples_per_s": 1 / step_s, **figures}


def test_sizes_take_turns_and_their_medians_are_written(monkeypatch, tmp_path):
    calls, times = [], iter([1.0, 5.0, 4.0, 3.0, 2.0, 8.0])

    def launch(words: list[str]) -> dict:
        calls.append(words)
        return result(next(times))

    monkeypatch.setattr(bench_scale, "launch", launch)
    path = tmp_path / "scale.json"
    flags = ["--ranks", "2", "--expert-model-parallel-sizes", "1", "2", "--output", str(path)]
    bench_scale.main([*flags, "--", "--steps", "3", "--no-bf16"])
    assert [words[-2] for words in calls] == ["1", "2", "2", "1", "1", "2"]
    report = json.loads(path.read_text())
    one, two = report["runs"]
    assert one["command"] == (
        "torchrun --standalone --nproc-per-node 2 tools/bench_train.py --steps 3 --no-bf16 "
        "--expert-model-parallel-size 1 --json"
    )
    assert [r["step_s"] for r in one["rounds"]] == [1.0, 3.0, 2.0]
    assert one["median"] == result(2.0)
    assert (two["expert_model_parallel_size"], two["median"]["step_s"]) == (2, 5.0)
    assert "cores" in report["hardware"]
    assert {"torch", "python"} <= report["versions"].keys()
    assert report.keys() == {"hardware", "versions", "commit", "runs"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--rounds", "x"], "--rounds: expected a whole number"),
        (["--expert-model-parallel-sizes", "1", "0"], "--expert-model-parallel-sizes 0"),
        (["--output", "/no/such/folder/x.json"], "no such folder /no/such/folder"),
        (["--step", "3"], "unknown argument --step"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bench_scale.main(["--output", str(tmp_path / "x.json"), *arguments])


@pytest.mark.dist
@pytest.mark.slow
def test_real_launches(tmp_path):
    for size, expected in ((1, 0), (2, 4 * 2 * (4 * 3 * 128) * 4)):  # exchanges x images x values x bytes
        figures = bench_scale.launch(bench_scale.command(2, size, FAST))
        assert figures["ranks"] == 2
        assert figures["all_to_all_bytes_per_rank_per_step"] == expected
    with pytest.raises(UserError, match="--nproc-per-node 1 .* ended with code 1"):
        bench_scale.launch(bench_scale.command(1, 1, ["--preset", "dmeo"]))


def has_joined(pid: int) -> bool:
    """Whether a process has threads of gloo, one of several ranks."""
    with contextlib.suppress(OSError):
        names = [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
        return names.count("pt_gloo_runloop") > 2
    return False


@pytest.mark.dist
@pytest.mark.slow
def test_a_stop_signal_ends_the_ranks(tmp_path):
    with marked_environment() as environment:
        (mark,) = (f"{k}={v}" for k, v in environment.items() if k == "MEGATRON_NUCLEUS_TEST")
        program = [sys.executable, str(ROOT / "tools/bench_scale.py"), "--ranks", "2", "--output"]
        flags = [*FAST, "--steps", "1000000"]
        process = subprocess.Popen([*program, str(tmp_path / "x.json"), "--", *flags], env=environment)
        try:
            deadline = time.monotonic() + 60
            while sum(has_joined(pid) for pid in processes_with(mark)) < 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 4
        finally:
            process.kill()
            process.wait()
        assert processes_with(mark) == []
    assert not (tmp_path / "x.json").exists()
