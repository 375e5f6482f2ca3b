"""A lock on a folder holds against other processes and ends with its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import exclusive

HOLD = """
import os, sys, time
from megatron_nucleus.utils.files import exclusive
with exclusive(sys.argv[1], "--run-dir"):
    if os.fork() == 0:  # a worker that outlives a killed parent
        os.close(0), os.close(1)
        time.sleep(30)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_the_holder_is_gone_even_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    message = rf"--run-dir {tmp_path}: another process is writing there"
    with pytest.raises(ConfigError, match=message), exclusive(tmp_path, "--run-dir"):
        pass
    holder.kill()
    assert holder.wait(timeout=30) == -signal.SIGKILL
    with exclusive(tmp_path, "--run-dir"):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    os.killpg(holder.pid, signal.SIGKILL)
    holder.communicate()


def test_an_error_inside_releases_the_folder(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path, "--output"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
