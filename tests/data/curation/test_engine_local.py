"""The pool of processes: what happens when one of them, or the program itself, is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from megatron_nucleus.data.curation.engines import WorkerDied
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
