"""What tests of a whole launch share: how far a run is, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_nucleus.training.metrics import read_metrics


def last_step(run_dir: Path) -> int:
    """Newest step in metrics.jsonl; 0 where there is none."""
    file = run_dir / "metrics.jsonl"
    written = read_metrics(file) if file.exists() else []  # leaves out a row that is being written
    return written[-1]["step"] if written else 0


@contextlib.contextmanager
def marked_environment() -> Iterator[dict[str, str]]:
    """Yield an environment for programs to start; whatever still runs with it after the block is killed.

    Launchers put their ranks in sessions of their own, where no signal to a process group finds them.
    """
    mark = f"MEGATRON_NUCLEUS_TEST={uuid.uuid4().hex}"
    try:
        yield os.environ | dict([mark.split("=")])
    finally:
        for pid in processes_with(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_with(setting: str) -> list[int]:
    """Ids of the processes that were started with ``NAME=value`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if setting.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
