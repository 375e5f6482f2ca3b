"""One-line errors, exit codes and stop signals of every program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_nucleus.utils import cli
from megatron_nucleus.utils.errors import ConfigError, DataError, StoppedError
from tests.support import ROOT


def outcome(main, capsys, *more) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.run(main, *more)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (DataError, 3), (StoppedError, 4)])
def test_an_error_of_the_user_is_one_line_and_its_code(capsys, kind, code):
    def main():
        raise kind("two\n lines")

    assert outcome(main, capsys) == (code, "error: two lines\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_code_4_and_nothing_takes_it_for_an_error(capsys, number):
    before = signal.getsignal(number)
    cleaned = []

    def main():
        try:
            try:
                os.kill(os.getpid(), number)
            except Exception:  # as decoders and readers of optional files do
                cleaned.append("taken for a damaged file")
        finally:
            cleaned.append("cleaned")

    line = f"error: stopped by {signal.Signals(number).name}; the same command goes on\n"
    assert outcome(main, capsys, "the same command goes on") == (4, line)
    assert cleaned == ["cleaned"]
    assert signal.getsignal(number) is before


def test_a_block_inside_may_take_the_signals_for_itself(capsys):
    seen = []

    def main():
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)

    code, line = outcome(main, capsys)
    assert (code, seen) == (4, ["mine"])
    assert line.startswith("error: stopped by SIGTERM; the same command")


def test_a_program_that_is_stopped_prints_no_traceback_and_leaves_nothing_half_written(tmp_path):
    """tools/make_scenes.py: its output is staged."""
    command = [
        sys.executable,
        ROOT / "tools/make_scenes.py",
        "--output",
        tmp_path / "out",
        "--count",
        "200000",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".*/.*")):  # the first shard of the staging folder
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 4
    assert error == "error: stopped by SIGTERM; the same command starts again\n"
    assert list(tmp_path.iterdir()) == []
