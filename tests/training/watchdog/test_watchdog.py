"""No rank waits for ever, and what the others say when one is lost: real processes that die, freeze and fail."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.parallel_state import create_groups, make_layout
from megatron_nucleus.training.watchdog.watchdog import Watchdog, watch_ranks
from megatron_nucleus.utils.errors import DataError, RankLostError, UserError
from tests.ranks import run_ranks

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks_preload"])
BAD_STEP = 2
LIMIT_S = 20.0
FAST = {"heartbeat_s": 0.15, "dead_after_s": 1.6}
ADVICE = "the same command resumes from the newest checkpoint"


# What the ranks of a test do


def steps(watchdog: Watchdog, rank: int, *, count: int, forward: Callable[[int], None]) -> None:
    """A training loop in small: ``forward(step)`` by oneself, then an exchange of all ranks."""
    for step in range(count):
        watchdog.at(step, "forward")
        forward(step)
        watchdog.at(step, "backward")
        received, sent = torch.zeros(6), torch.full((6,), float(rank))
        dist.all_to_all_single(received, sent)


def at_bad_step(action: Callable[[], None]) -> Callable[[int], None]:
    return lambda step: action() if step == BAD_STEP else time.sleep(0.05)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def noop(step: int) -> None:
    pass


def dies(rank: int, watchdog: Watchdog, victim: int) -> None:
    steps(watchdog, rank, count=5, forward=at_bad_step(kill(signal.SIGKILL)) if rank == victim else noop)


def freezes(rank: int, watchdog: Watchdog, victim: int) -> None:
    steps(watchdog, rank, count=5, forward=at_bad_step(kill(signal.SIGSTOP)) if rank == victim else noop)


def raises_data_error(rank: int, watchdog: Watchdog, victim: int) -> None:
    def damaged() -> None:
        raise DataError("shard 00003.tar is damaged;\ndownload it again")

    steps(watchdog, rank, count=5, forward=at_bad_step(damaged) if rank == victim else noop)


def raises_while_all_are_blind(rank: int, watchdog: Watchdog, victim: int) -> None:
    watchdog.at(BAD_STEP, "forward")
    if rank == victim:
        time.sleep(0.5)
        raise DataError("shard 00003.tar is damaged")
    threading.Event().wait(60)


def loads_for_ever(rank: int, watchdog: Watchdog, victim: int) -> None:
    watchdog.at(BAD_STEP, "waiting for data")
    if rank == victim:
        threading.Event().wait(60)
    watchdog.at(BAD_STEP, "forward")
    dist.all_reduce(torch.ones(1))


def waits_on_a_device(rank: int, watchdog: Watchdog, victim: int) -> None:
    """A collective that runs by itself, as on a GPU, while the Python thread is elsewhere."""
    watchdog.at(BAD_STEP, "forward")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    watchdog.at(BAD_STEP, "backward")
    dist.all_reduce(torch.ones(4), async_op=True)
    threading.Event().wait(60)


def is_slow_and_busy(rank: int, watchdog: Watchdog, victim: int) -> None:
    """Slower than several heartbeats, once in Python and once in C that keeps Python's lock; no reason for alarm."""

    def busy(step: int) -> None:
        if step == 1:
            until = time.monotonic() + 1.2
            while time.monotonic() < until:
                pass
        if step == 2:
            ctypes.PyDLL(None).usleep(600_000)  # a PyDLL keeps the lock

    steps(watchdog, rank, count=4, forward=busy if rank == victim else noop)
    watchdog.at(4, "checkpoint", timeout_s=30.0)
    if rank == victim:
        time.sleep(3.0)  # longer than the usual time, as announced, also for those that wait elsewhere
    watchdog.at(4, "sums of the step")
    dist.barrier()
    watchdog.at(5, "checkpoint")
    if rank != victim:
        time.sleep(1.0)  # finishes later


def is_suspended(rank: int, watchdog: Watchdog, victim: int) -> None:
    """What happens while the whole job is stopped for longer than any limit."""
    steps(watchdog, rank, count=40, forward=lambda step: time.sleep(0.02))


# Running them


def main(
    rank: int, world: int, folder: Path, scenario, victim: int, store_rank: int | None, timeout_s: float
):
    """One rank, as `tools/train.py` would end it: with a line on stderr and an exit code."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    hosts = rank == store_rank
    port = 0 if hosts else int(wait_for(folder / "port").read_text())
    store = dist.TCPStore("127.0.0.1", port, world, hosts, wait_for_workers=False)
    if hosts:
        announce(folder, store)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    dist.barrier()
    (folder / f"{rank}.started").touch()
    try:
        with Watchdog(
            dist.PrefixStore("watch", store), rank, world, timeout_s, store_rank=store_rank, **FAST
        ) as watchdog:
            scenario(rank, watchdog, victim)
    except UserError as error:
        os.write(2, f"error: {' '.join(str(error).split())}\n".encode())
        os._exit(error.exit_code)
    except BaseException as error:
        os.write(2, f"bug: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def announce(folder: Path, store: dist.TCPStore) -> None:
    (folder / "port.part").write_text(str(store.port))
    (folder / "port.part").rename(folder / "port")


def wait_for(path: Path) -> Path:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)
    return path


class Outcome(NamedTuple):
    """Exit code (None: still there) and last line (or "") of each rank."""

    codes: list[int | None]
    messages: list[str]


def run(
    folder: Path,
    scenario,
    *,
    world: int = 3,
    victim: int = 1,
    store_rank: int | None = None,
    stuck: tuple[int, ...] = (),
    suspend_s: float = 0.0,
    timeout_s: float = 2.5,
) -> Outcome:
    """Run ``scenario`` on ``world`` ranks and wait for all but the ``stuck`` ones. Nothing is left behind.

    Args:
        store_rank: None: this process hosts the store, as a launcher does.
        suspend_s: stop all ranks for so long once they run.
    """
    server = None
    if store_rank is None:
        server = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        announce(folder, server)
    processes = [
        CONTEXT.Process(target=main, args=(rank, world, folder, scenario, victim, store_rank, timeout_s))
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        for rank in range(world):
            wait_for(folder / f"{rank}.started")
        began = time.monotonic()
        if suspend_s:
            time.sleep(3 * FAST["heartbeat_s"])
            suspend(processes, suspend_s)
        for rank, process in enumerate(processes):
            if rank not in stuck:
                process.join(max(0.0, began + LIMIT_S - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        del server
    return Outcome(codes, [last_words(folder / f"{rank}.err") for rank in range(world)])


def suspend(processes: list, seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)


def last_words(path: Path) -> str:
    said = [line for line in path.read_text().splitlines() if line.startswith(("error: ", "bug: "))]
    assert len(said) <= 1, said
    return said[0] if said else ""


def assert_says(outcome: Outcome, ranks: list[int], pattern: str) -> None:
    """Those ranks ended with code 5 and a line that matches."""
    for rank in ranks:
        assert outcome.codes[rank] == RankLostError.exit_code, (outcome.codes, outcome.messages)
        assert outcome.messages[rank].startswith(f"error: rank {rank}: "), outcome.messages
        assert outcome.messages[rank].endswith(f"; {ADVICE}"), outcome.messages
        assert re.search(pattern, outcome.messages[rank]), outcome.messages[rank]


def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path):
    outcome = run(tmp_path, dies)
    assert outcome.codes[1] == -signal.SIGKILL
    assert_says(
        outcome,
        [0, 2],
        r"[Cc]onnection .*in step 2, backward, in all_to_all_single \(watchdog/test_watchdog.py:\d+\)",
    )
    assert_says(outcome, [0, 2], r"; rank 1 is dead or frozen: last sign of life \d+ s ago, ")


def test_a_rank_that_stands_still_is_named_by_the_others(tmp_path):
    outcome = run(tmp_path, freezes, stuck=(1,), timeout_s=30.0)  # long before any timeout
    assert outcome.codes[1] is None
    assert_says(
        outcome,
        [0, 2],
        r"waited \d+ s in step 2, backward, in all_to_all_single \(watchdog/test_watchdog.py:\d+\); ",
    )
    assert_says(outcome, [0, 2], r"; rank 1 is dead or frozen: last sign of life \d+ s ago, ")


@pytest.mark.parametrize("scenario", [raises_data_error, raises_while_all_are_blind])
def test_the_error_of_one_rank_ends_all_and_is_what_they_name(tmp_path, scenario):
    outcome = run(tmp_path, scenario, timeout_s=30.0)
    assert outcome.codes[1] == DataError.exit_code
    assert outcome.messages[1].startswith("error: shard 00003.tar is damaged")
    assert_says(
        outcome, [0, 2], r"; rank 1 ended in step 2, forward, at .*: DataError: shard 00003.tar is damaged"
    )


def test_a_rank_that_does_not_arrive_in_time_is_named_with_its_phase(tmp_path):
    outcome = run(tmp_path, loads_for_ever)
    cause = (
        r"; rank 1 has not arrived: alive, for \d+ s in step 2, waiting for data, at .*; "
        r"ranks 0,2 wait in step 2, forward, in all_reduce \(watchdog/test_watchdog.py:\d+\);"
    )
    assert_says(outcome, [0, 1, 2], cause)
    assert_says(outcome, [1], r"^error: rank 1: for \d+ s in step 2, waiting for data, ")


def test_a_collective_that_the_device_waits_in_is_named(tmp_path):
    outcome = run(tmp_path, waits_on_a_device, world=2, stuck=(1,), timeout_s=30.0)
    device = r"waited \d+ s in step 2, backward, at .*, the device in gloo:all_reduce \[\[4\]\] of group default_pg; "
    assert_says(outcome, [0], device + "rank 1 is dead or frozen")


def test_slow_ranks_and_different_ends_raise_no_alarm(tmp_path):
    outcome = run(tmp_path, is_slow_and_busy, victim=2, store_rank=0)
    assert outcome == ([0, 0, 0], ["", "", ""])


def test_a_suspended_job_goes_on(tmp_path):
    outcome = run(tmp_path, is_suspended, suspend_s=3.0)
    assert outcome == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize(
    ("scenario", "what"), [(dies, r"is gone \(.+\)"), (freezes, "has not answered for 2 s")]
)
def test_the_rank_that_hosts_the_store_takes_it_along(tmp_path, scenario, what):
    outcome = run(tmp_path, scenario, victim=0, store_rank=0, stuck=(0,), timeout_s=30.0)
    assert_says(outcome, [1, 2], r"in all_to_all_single \(watchdog/test_watchdog.py:\d+\); ")
    assert_says(outcome, [1, 2], rf"; rank 0, which hosts the rendezvous store at 127.0.0.1:\d+, {what};")


def test_an_error_of_the_rank_that_hosts_the_store_is_still_read(tmp_path):
    outcome = run(tmp_path, raises_while_all_are_blind, victim=0, store_rank=0, timeout_s=30.0)
    assert outcome.codes[0] == DataError.exit_code
    assert_says(
        outcome, [1, 2], "; rank 0 ended in step 2, forward, at .*: DataError: shard 00003.tar is damaged"
    )


# The whole, as the trainer uses it


def two_runs_in_one_process_group(folder: Path) -> list[str]:
    parallel = create_groups(make_layout(2, experts=4), torch.device("cpu"), 0, 60.0)
    found = []
    for attempt in range(2):
        try:
            with watch_ranks(parallel, 60.0) as watchdog:
                watchdog.at(0, "forward")
                if parallel.rank == 1 and attempt == 0:
                    raise DataError("shard 7 is damaged")
                if attempt == 0:
                    while watchdog._cause is None:
                        time.sleep(0.05)
                    raise RuntimeError("gloo: Connection closed by peer")
                while len(watchdog._board.seen) < 2:
                    time.sleep(0.05)
                found.append(str(watchdog._cause))
        except UserError as error:
            found.append(f"{type(error).__name__}: {error}")
        dist.barrier(parallel.control)
    return found


def test_watching_the_ranks_of_a_process_group(tmp_path):
    first, second = run_ranks(2, two_runs_in_one_process_group, tmp_path, tmp_path, timeout_s=60.0)
    assert second == ["DataError: shard 7 is damaged", "None"]
    assert first[0].startswith("RankLostError: rank 0: gloo: Connection closed by peer, in step 0, forward")
    assert "; rank 1 ended in step 0, forward, at " in first[0]
    assert first[1] == "None"
