"""No rank waits for ever, and what the others say when one is lost: real processes that die, freeze and fail."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.parallel_state import create_groups, make_layout
from megatron_nucleus.training.watchdog.roll_call import (
    DONE,
    ENDED,
    RUNNING,
    Beat,
    Sighting,
    find_missing,
    find_silent,
    rank_list,
)
from megatron_nucleus.training.watchdog.watchdog import Watchdog, watch_ranks
from megatron_nucleus.training.watchdog.whereabouts import (
    Line,
    find_place,
    place_of_error,
    place_of_thread,
    unfinished_collective,
)
from megatron_nucleus.utils.errors import DataError, RankLostError, StoppedError, UserError
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


def says(outcome: Outcome, ranks: list[int], pattern: str) -> None:
    """Those ranks ended with code 5 and a line that matches."""
    for rank in ranks:
        assert outcome.codes[rank] == RankLostError.exit_code, (outcome.codes, outcome.messages)
        assert outcome.messages[rank].startswith(f"error: rank {rank}: "), outcome.messages
        assert outcome.messages[rank].endswith(f"; {ADVICE}"), outcome.messages
        assert re.search(pattern, outcome.messages[rank]), outcome.messages[rank]


def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path):
    outcome = run(tmp_path, dies)
    assert outcome.codes[1] == -signal.SIGKILL
    says(
        outcome,
        [0, 2],
        r"[Cc]onnection .*in step 2, backward, in all_to_all_single \(watchdog/test_watchdog.py:\d+\)",
    )
    says(outcome, [0, 2], r"; rank 1 is dead or frozen: last sign of life \d+ s ago, ")


def test_a_rank_that_stands_still_is_named_by_the_others(tmp_path):
    outcome = run(tmp_path, freezes, stuck=(1,), timeout_s=30.0)  # long before any timeout
    assert outcome.codes[1] is None
    says(
        outcome,
        [0, 2],
        r"waited \d+ s in step 2, backward, in all_to_all_single \(watchdog/test_watchdog.py:\d+\); ",
    )
    says(outcome, [0, 2], r"; rank 1 is dead or frozen: last sign of life \d+ s ago, ")


@pytest.mark.parametrize("scenario", [raises_data_error, raises_while_all_are_blind])
def test_the_error_of_one_rank_ends_all_and_is_what_they_name(tmp_path, scenario):
    outcome = run(tmp_path, scenario, timeout_s=30.0)
    assert outcome.codes[1] == DataError.exit_code
    assert outcome.messages[1].startswith("error: shard 00003.tar is damaged")
    says(outcome, [0, 2], r"; rank 1 ended in step 2, forward, at .*: DataError: shard 00003.tar is damaged")


def test_a_rank_that_does_not_arrive_in_time_is_named_with_its_phase(tmp_path):
    outcome = run(tmp_path, loads_for_ever)
    cause = (
        r"; rank 1 has not arrived: alive, for \d+ s in step 2, waiting for data, at .*; "
        r"ranks 0,2 wait in step 2, forward, in all_reduce \(watchdog/test_watchdog.py:\d+\);"
    )
    says(outcome, [0, 1, 2], cause)
    says(outcome, [1], r"^error: rank 1: for \d+ s in step 2, waiting for data, ")


def test_a_collective_that_the_device_waits_in_is_named(tmp_path):
    outcome = run(tmp_path, waits_on_a_device, world=2, stuck=(1,), timeout_s=30.0)
    device = r"waited \d+ s in step 2, backward, at .*, the device in gloo:all_reduce \[\[4\]\] of group default_pg; "
    says(outcome, [0], device + "rank 1 is dead or frozen")


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
    says(outcome, [1, 2], r"in all_to_all_single \(watchdog/test_watchdog.py:\d+\); ")
    says(outcome, [1, 2], rf"; rank 0, which hosts the rendezvous store at 127.0.0.1:\d+, {what};")


def test_an_error_of_the_rank_that_hosts_the_store_is_still_read(tmp_path):
    outcome = run(tmp_path, raises_while_all_are_blind, victim=0, store_rank=0, timeout_s=30.0)
    assert outcome.codes[0] == DataError.exit_code
    says(outcome, [1, 2], "; rank 0 ended in step 2, forward, at .*: DataError: shard 00003.tar is damaged")


# Several ranks in this process, over a store in memory


def silence(dog: Watchdog) -> None:
    """End its threads, without a goodbye."""
    dog._stop.set()
    if dog._thread.is_alive():
        dog._thread.join()
        dog._board.stop()


class Ranks:
    """Watchdogs that note their last line instead of ending the process."""

    def __init__(self, world: int, timeout_s: float, watched: Sequence[int] | None = None, **options):
        store = dist.HashStore()
        self.watched = range(world) if watched is None else watched
        self.said: dict[int, str] = {}
        self.codes: list[int] = []
        self.dogs = [
            Watchdog(
                store, rank, world, timeout_s,
                emit=lambda text, rank=rank: self.said.setdefault(rank, text), end=self.codes.append,
                **({"heartbeat_s": 0.1, "dead_after_s": 1.0} | options),
            )
            for rank in range(world)
        ]  # fmt: skip

    def __enter__(self) -> Ranks:
        for rank in self.watched:
            self.dogs[rank].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for dog in self.dogs:
            silence(dog)

    def at(self, step: int, phase: str) -> None:
        for rank in self.watched:
            self.dogs[rank].at(step, phase)

    def wait(self, count: int) -> None:
        """Until ``count`` ranks have ended."""
        until = time.monotonic() + 20
        while len(self.said) < count or len(self.codes) < count:
            assert time.monotonic() < until, self.said
            time.sleep(0.02)
        assert self.codes == [RankLostError.exit_code] * count


def test_a_deadlock_blames_nobody():
    with Ranks(3, timeout_s=0.6) as ranks:
        ranks.at(7, "optimizer")
        ranks.wait(3)
    for said in ranks.said.values():
        assert "; all 3 ranks are alive and in the same phase: a deadlock, or slow work or links; " in said


def test_who_has_finished_is_missed_but_not_dead():
    with Ranks(3, timeout_s=2.0) as ranks:
        ranks.at(7, "checkpoint")
        ranks.dogs[1].__exit__(None, None, None)
        ranks.dogs[2].at(8, "forward")
        ranks.wait(2)
    assert set(ranks.said) == {0, 2}
    for said in ranks.said.values():
        assert "; rank 1 finished the run in step 7, checkpoint; " in said


def test_ranks_that_stop_on_purpose_are_no_failure():
    with Ranks(2, timeout_s=5.0) as ranks:
        stop = StoppedError("time is up")
        ranks.dogs[0].__exit__(StoppedError, stop, None)
        time.sleep(1.5)
        ranks.dogs[1].__exit__(StoppedError, stop, None)
    assert ranks.said == {}


def test_with_many_ranks_a_few_read_the_beats_of_all():
    with Ranks(40, timeout_s=30.0, heartbeat_s=0.3, dead_after_s=2.5) as ranks:
        ranks.at(1, "forward")
        time.sleep(0.7)
        readers = [rank for rank, dog in enumerate(ranks.dogs) if dog._board.full_looks]
        assert readers == list(range(0, 40, 2))
        silence(ranks.dogs[33])
        ranks.wait(39)
    for said in ranks.said.values():
        assert "; rank 33 is dead or frozen: last sign of life" in said


def test_without_any_of_the_few_the_others_find_out_when_they_are_late():
    with Ranks(34, timeout_s=0.5, heartbeat_s=0.2, watched=range(1, 34, 2)) as ranks:
        ranks.at(1, "forward")
        ranks.wait(17)
    evens = ",".join(map(str, range(0, 34, 2)))
    for said in ranks.said.values():
        assert f"; ranks {evens} never gave a sign of life; " in said


def test_a_single_process_is_left_alone():
    with Watchdog(None, 0, 1, 0.01) as watchdog:
        before = threading.active_count()
        watchdog.at(0, "forward")
        time.sleep(0.1)
        assert watchdog.lost(RuntimeError("gloo: Connection closed by peer")) is None
        watchdog.failed(ValueError("x"))
        assert threading.active_count() == before
    with pytest.raises(ValueError, match="mine"), Watchdog(None, 0, 1, 0.01):
        raise ValueError("mine")


def test_saying_what_comes_next_is_cheap():
    watchdog = Watchdog(dist.HashStore(), 0, 2, 60.0)
    began = time.perf_counter()
    for step in range(20_000):
        watchdog.at(step, "forward")
    assert (time.perf_counter() - began) / 20_000 < 2e-5


def test_a_deadline_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="dead_after_s 1.0"):
        Watchdog(dist.HashStore(), 0, 2, 60.0, dead_after_s=1.0)


# Errors: whose fault?


def raised(error: Exception, file: str, function: str = "work") -> Exception:
    """``error`` with a traceback that ends in ``file``."""
    code = compile(f"def {function}(error):\n    raise error", file, "exec")
    space: dict = {}
    exec(code, space)
    try:
        space[function](error)
    except type(error):
        return error


DISTRIBUTED = dist.distributed_c10d.__file__
LOCAL = [
    raised(ValueError("bad argument"), DISTRIBUTED),
    raised(RuntimeError("DataLoader timed out after 60 seconds"), "/x/torch/utils/data/dataloader.py"),
    raised(torch.OutOfMemoryError("CUDA out of memory"), DISTRIBUTED),
    raised(ConnectionResetError("connection reset"), "/x/s3.py"),
]


@pytest.mark.parametrize("error", LOCAL, ids=lambda error: type(error).__name__)
def test_an_error_of_ones_own_is_told_to_the_others_at_once(error):
    with Ranks(2, timeout_s=30.0, dead_after_s=5.0) as ranks:
        ranks.at(3, "forward")
        began = time.monotonic()
        assert ranks.dogs[0].lost(error) is None
        assert time.monotonic() - began < 4.0  # did not wait to see who is dead
        ranks.wait(1)
    assert "; rank 0 ended in step 3, forward, " in ranks.said[1]
    assert ranks.said[1].endswith(f": {type(error).__name__}: {error}; {ADVICE}")


def test_an_error_inside_a_collective_while_all_are_well_is_ones_own():
    with Ranks(2, timeout_s=30.0) as ranks:
        error = raised(RuntimeError("Tensors must be contiguous"), DISTRIBUTED, "all_reduce")
        ranks.dogs[1]._error_place = place_of_error(error)  # it came to the same line
        assert ranks.dogs[0].lost(error) is None
    assert ranks.dogs[0]._board.finding.ranks == (0,)


def test_a_broken_connection_between_living_ranks_is_no_bug():
    with Ranks(2, timeout_s=30.0) as ranks:
        ranks.at(3, "backward")
        text = "[gloo/pair.cc:5] Connection reset by peer. Check the logs"
        error = raised(RuntimeError(text), DISTRIBUTED, "all_reduce")
        ranks.dogs[1]._error_place = place_of_error(error)
        verdict = str(ranks.dogs[0].lost(error))
    assert verdict.startswith("rank 0: Connection reset by peer, in step 3, backward, in all_reduce (")
    assert "; all 2 ranks are alive and in the same phase" in verdict


# Sentences


def seen(silent_s: float = 0.0, **changes) -> Sighting:
    beat = Beat(1, 12, 3, "backward", 40.0, 60.0, "in all_reduce (core/x.py:8)", True, RUNNING)
    return Sighting(beat._replace(**changes), silent_s)


def test_beats_and_findings_survive_the_store():
    beat = seen().beat
    assert Beat.from_text(beat.to_text().encode()) == beat
    finding = find_missing(3, {0: seen(), 2: seen()}, 1.0)
    assert finding == ((1,), "rank 1 never gave a sign of life")
    assert type(finding).from_text(finding.to_text()) == finding


def test_silent_ranks_of_one_place_share_a_clause_and_neighbours_in_time_are_named_along():
    ranks = {
        0: seen(),
        1: seen(16.0),
        2: seen(14.0),
        3: seen(16.0, phase="forward", place=""),
        4: seen(99.0, state=DONE),
    }
    assert find_silent(ranks, 17.0, 4.0) is None
    finding = find_silent(ranks, 15.0, 4.0)
    assert finding.ranks == (1, 2, 3)
    assert finding.text == (
        "ranks 1-2 are dead or frozen: last sign of life 16 s ago, in step 12, backward, in all_reduce (core/x.py:8); "
        "rank 3 is dead or frozen: last sign of life 16 s ago, in step 12, forward"
    )


def test_who_is_missing():
    at = {"place": "at data/loader.py:31 in __next__", "waits": False}
    slow = seen(index=2, phase="waiting for data", seconds=61.0, **at)
    waiting = "ranks 0-1 wait in step 12, backward, in all_reduce (core/x.py:8)"
    behind = find_missing(3, {0: seen(), 1: seen(), 2: slow}, 6.0)
    assert behind.ranks == (2,)
    assert behind.text == (
        "rank 2 has not arrived: alive, for 61 s in step 12, waiting for data, at data/loader.py:31 in __next__; "
        + waiting
    )
    elsewhere = find_missing(3, {0: seen(), 1: seen(), 2: seen(**at)}, 6.0)
    assert elsewhere.text.startswith(
        "rank 2 has not arrived: alive, for 40 s in step 12, backward, at data/loader.py"
    )
    gone = find_missing(3, {0: seen(), 1: seen(7.0), 2: seen(state=ENDED)}, 6.0)
    assert gone.ranks == (1, 2)
    assert gone.text.startswith("rank 1 gave no sign of life for 7 s, the last in step 12")
    assert gone.text.endswith("rank 2 ended with an error in step 12, backward, in all_reduce (core/x.py:8)")
    mixed = find_missing(2, {0: seen(), 1: seen(place="in broadcast (core/y.py:9)")}, 6.0)
    assert mixed.ranks == ()
    assert "rank 0 waits in step 12, backward, in all_reduce" in mixed.text
    assert "rank 1 waits in step 12, backward, in broadcast" in mixed.text


def test_a_message_about_thousands_of_ranks_stays_a_line():
    ranks = {rank: seen(index=rank % 7) for rank in range(4096)}
    finding = find_missing(4096, {0: seen(index=9), **{r: s for r, s in ranks.items() if r}}, 6.0)
    assert len(finding.ranks) == 4095
    assert "; 1755 more ranks elsewhere; rank 0 waits" in finding.text
    assert rank_list([5, 0, 1, 2, 9, 10]) == "ranks 0-2,5,9-10"


# Places


def test_the_collective_is_named_with_the_line_that_called_it():
    package = Path(sys.modules[Watchdog.__module__].__file__).parents[1]
    logger = dist.c10d_logger.__file__
    stack = [
        Line(DISTRIBUTED, 5140, "all_to_all_single"),
        Line(logger, 83, "wrapper"),
        Line(f"{package}/core/collectives.py", 88, "exchange"),
        Line(f"{package}/core/moe/dispatcher.py", 30, "dispatch"),
    ]
    assert find_place(stack) == ("in all_to_all_single (core/collectives.py:88)", True)
    assert find_place(stack[2:]) == ("in exchange (core/collectives.py:88)", True)
    assert find_place(stack[3:]) == ("at core/moe/dispatcher.py:30 in dispatch", False)
    queue = Line("/usr/lib/python3.11/queue.py", 171, "get")
    assert find_place([queue, *stack[3:]]) == ("at core/moe/dispatcher.py:30 in dispatch", False)
    assert find_place([queue]) == ("at python3.11/queue.py:171 in get", False)
    assert find_place([]) == ("", False)


def test_a_thread_without_a_frame_is_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "_current_frames", lambda: {1: print})
    assert place_of_thread(1) == ("", False)
    assert place_of_thread(2) == ("", False)


def test_autograds_threads_are_looked_at_while_the_main_thread_waits_for_them(monkeypatch):
    def frame(file: str, function: str, outer=None):
        return SimpleNamespace(
            f_code=SimpleNamespace(co_filename=file, co_name=function), f_lineno=7, f_back=outer
        )

    engine = frame("/v/torch/autograd/graph.py", "_engine_run_backward")
    helper = frame(DISTRIBUTED, "gather_object")  # a thread of ours, such as one that saves a checkpoint
    device = frame(DISTRIBUTED, "all_to_all_single", frame("/x/model.py", "backward"))
    with_helper = {1: engine, threading.get_ident(): helper}
    monkeypatch.setattr(sys, "_current_frames", lambda: with_helper)
    assert place_of_thread(1) == ("at autograd/graph.py:7 in _engine_run_backward", False)
    monkeypatch.setattr(sys, "_current_frames", lambda: {**with_helper, 2: device})
    assert place_of_thread(1) == ("in all_to_all_single (x/model.py:7)", True)
    assert place_of_thread(3) == ("", False)


def test_without_collectives_none_is_unfinished():
    assert unfinished_collective() is None


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
