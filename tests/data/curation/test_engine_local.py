"""The pool of processes: what happens when one of them, or the program itself, is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_nucleus.data.curation.engines import WorkerDied, local
from megatron_nucleus.data.curation.engines.local import LocalEngine
from tests.data.curation import toy_stages
from tests.support import ROOT

ORPHANS = """
import os, sys, time
from megatron_nucleus.data.curation.engines.local import LocalEngine
from tests.data.curation import toy_stages
engine = LocalEngine(2)
print(*{pid for _, pid in engine.map(toy_stages.process_id, range(20))}, flush=True)
time.sleep(60)
"""


def test_a_worker_killed_while_idle_costs_nothing():
    engine = LocalEngine(2)
    try:
        results = []
        for task, result in engine.map(toy_stages.process_id, range(12)):
            results.append((task, result))
            if task == 3 and not isinstance(result, WorkerDied):
                os.kill(result, signal.SIGKILL)
                time.sleep(0.3)  # the pool knows it is broken before the next task is handed over
        assert sorted(task for task, _ in results) == list(range(12))  # every task comes back, once
        lost = [task for task, result in results if isinstance(result, WorkerDied)]
        assert len(lost) <= 4  # those in flight
        assert dict(engine.map(toy_stages.square, range(3)))[2] == (2, 4)
    finally:
        engine.close()


def test_without_a_pool_everything_runs_here():
    engine = LocalEngine(1, pool=False)
    assert {pid for _, pid in engine.map(toy_stages.process_id, range(3))} == {os.getpid()}


def test_workers_do_not_outlive_a_program_that_nobody_has_waited_for():
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert workers
    process.kill()  # and no wait: it stays in the table of processes
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)
    assert process.communicate(timeout=10)[0] == ""  # nobody holds the pipe


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_task_alone_that_ends_its_process():
    engine = LocalEngine(2)
    assert isinstance(engine.alone(toy_stages.die, 0), WorkerDied)
    assert engine.alone(toy_stages.square, 5) == (5, 25)


class _Closing:
    """A pool that fails to submit once, in the words of a pipe or of the system, then works."""

    def __init__(self, error: OSError):
        self.error: OSError | None = error

    def open(self, *shape):
        pool = _POOL(*shape)
        submit = pool.submit

        def fail_once(*args):
            error, self.error = self.error, None
            if error is not None:
                raise error
            return submit(*args)

        pool.submit = fail_once
        return pool


_POOL = local._pool


def test_a_pool_that_is_just_being_taken_down_loses_no_task(monkeypatch):
    """Between a worker's death and the pool's own verdict its pipes are closed already."""
    monkeypatch.setattr(local, "_pool", _Closing(OSError("handle is closed")).open)
    engine = LocalEngine(2)
    try:
        assert dict(engine.map(toy_stages.square, range(6))) == {n: (n, n * n) for n in range(6)}
    finally:
        engine.close()


def test_the_systems_own_refusal_is_told(monkeypatch):
    monkeypatch.setattr(local, "_pool", _Closing(OSError(24, "Too many open files")).open)
    engine = LocalEngine(2)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            dict(engine.map(toy_stages.square, range(6)))
    finally:
        engine.close()
