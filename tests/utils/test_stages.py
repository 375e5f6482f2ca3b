"""utils/stages.py: programs one after another, remembered, and several side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_nucleus.utils.errors import ConfigError, StoppedError
from megatron_nucleus.utils.stages import Call, Runner, Stage, run_side_by_side

# Writes "<name> start/end <time>" lines to a file, says a word on stderr, and ends as it is told.
PROGRAM = """
import json, pathlib, signal, sys, time
log, name, seconds, code = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
def note(word):
    with open(log, "a") as file:
        file.write(f"{name} {word} {time.monotonic()}\\n")
def stop(*_):
    note("stopped")
    sys.exit(4)
signal.signal(signal.SIGTERM, stop)
note("start")
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.01)
note("end")
print(f"error: {name} is broken" if code else "fine", file=sys.stderr)
print(json.dumps({"ran": name, "json": sys.argv[-1]}))
sys.exit(code)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def events(tmp_path: Path) -> list[list[str]]:
    log = tmp_path / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def call(tmp_path: Path, name: str, seconds: float = 0.0, code: int = 0) -> Call:
    argv = ("program.py", str(tmp_path / "log"), name, str(seconds), str(code))
    return Call(argv, tmp_path / "logs" / f"{name}.txt")


def chain(calls: list[Call], results: list[dict]):
    for one in calls:
        results.append((yield one))


def test_chains_run_in_order_and_two_at_a_time(tmp_path, program):
    results: dict[str, list[dict]] = {"a": [], "b": [], "c": []}
    jobs = [
        (name, chain([call(tmp_path, f"{name}{i}", 0.3) for i in range(2)], results[name])) for name in "abc"
    ]
    assert run_side_by_side(jobs, 2, root=tmp_path) == {}
    for name in "abc":
        assert [r["ran"] for r in results[name]] == [f"{name}0", f"{name}1"]
        assert all(r["json"] == "--json" for r in results[name])
    times = {(name, word): float(at) for name, word, at in events(tmp_path)}
    assert times["b0", "start"] < times["a0", "end"]
    assert times["a0", "start"] < times["b0", "end"]
    assert times["c0", "start"] > min(times["a1", "end"], times["b1", "end"])
    running = 0
    for _, word, _ in sorted(events(tmp_path), key=lambda e: float(e[2])):
        running += {"start": 1, "end": -1}[word]
        assert running <= 2


def test_a_failed_chain_ends_alone_and_is_named(tmp_path, program):
    results: list[dict] = []
    bad = [call(tmp_path, "bad", code=2), call(tmp_path, "never")]
    jobs = [("broken job", chain(bad, [])), ("good job", chain([call(tmp_path, "good", 0.2)], results))]
    failed = run_side_by_side(jobs, 1, root=tmp_path)
    assert list(failed) == ["broken job"]
    assert isinstance(failed["broken job"], ConfigError)
    assert "ended with code 2: error: bad is broken" in str(failed["broken job"])
    assert str(tmp_path / "logs" / "bad.txt") in str(failed["broken job"])
    assert [r["ran"] for r in results] == ["good"]
    assert "never" not in {name for name, *_ in events(tmp_path)}


def test_the_end_of_time_stops_what_runs_and_waits_for_it(tmp_path, program):
    jobs = [("long", chain([call(tmp_path, "long", 60)], [])), ("next", chain([call(tmp_path, "next")], []))]
    with pytest.raises(StoppedError, match="the same command continues"):
        run_side_by_side(jobs, 1, root=tmp_path, end=time.monotonic() + 0.7)
    assert [event[:2] for event in events(tmp_path)] == [["long", "start"], ["long", "stopped"]]


CALLER = """
import sys, pathlib
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.stages import Call, run_side_by_side
folder = pathlib.Path(sys.argv[1])
def job():
    yield Call(("program.py", str(folder / "log"), "child", "60", "0"), folder / "child.txt")
cli.run(lambda: run_side_by_side([("job", job())], 1, root=folder), "goes on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_programs_end_with_their_caller(tmp_path, program, number):
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not events(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    words = [word for _, word, _ in events(tmp_path)]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        time.sleep(0.2)
        assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _runs(pid, tmp_path)]
        assert words == ["start"]
    else:  # the program saved before its caller ended
        assert (process.returncode, words) == (4, ["start", "stopped"])
        assert f"stopped by {number.name}; goes on" in error


def _runs(pid: str, folder: Path) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return str(folder) in Path(f"/proc/{pid}/cmdline").read_text() and state != "Z"
    except OSError:
        return False


def test_a_changed_stage_runs_again_with_all_after_it_and_interrupted_time_counts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "log = pathlib.Path(sys.argv[1]); log.write_text((log.read_text() if log.exists() else '') + sys.argv[2])\n"
        "time.sleep(0.2)\n"
        "sys.exit(4) if pathlib.Path(sys.argv[1] + '.fail').exists() else print(json.dumps({'ran': sys.argv[2]}))\n"
    )
    config, base, log = tmp_path / "config", tmp_path / "base", tmp_path / "log"
    config.write_text("1")
    base.write_text("1")
    fresh = tmp_path / "fresh"

    def run_all() -> Runner:
        runner = Runner(tmp_path, tmp_path, total=3)
        for name in "abc":
            stage = Stage(
                name, ("script.py", str(log), name), reads=(config, base) if name == "b" else (),
                fresh=(fresh,) if name == "c" else (),
            )  # fmt: skip
            assert runner.run(stage) == {"ran": name}
        return runner

    run_all()
    run_all()
    assert log.read_text() == "abc"
    base.write_text("2")
    fresh.mkdir()
    run_all()
    assert log.read_text() == "abcbc"
    assert not fresh.exists()
    config.write_text("3")
    fail = tmp_path / "log.fail"
    fail.touch()
    with pytest.raises(StoppedError, match="stage 'b' ended with code 4"):
        run_all()
    fail.unlink()
    assert run_all().seconds()["b"] > 0.4
    assert log.read_text() == "abcbcbbc"
    assert json.loads((tmp_path / "steps.json").read_text())["unfinished_s"] == {}
