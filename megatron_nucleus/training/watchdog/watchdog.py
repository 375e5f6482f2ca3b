"""No rank waits for ever: when one died or is stuck, the others end, with a message that names it.

A collective waits for all of its ranks. When one is gone, the main threads of the others stand in C++ code that no
exception reaches (NCCL), or get an error that names no rank (gloo). So two threads of every rank keep watch: one writes
signs of life and reads those of others (`bulletin.py`); the other, the judge, never touches the store, whose answer may
not come, and ends the process when there is a reason to.

Whoever finds a reason first posts it, and all ranks repeat that one: the cause is named, not what followed from it.
Signs of life come from a thread, so that a slow rank or a busy machine does not look dead; only a process that is gone
or stopped does, or C code that keeps Python's lock for longer than ``dead_after_s``.
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from megatron_nucleus.core.collectives import on_first_rank
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.training.watchdog.bulletin import BulletinBoard, host_and_port
from megatron_nucleus.training.watchdog.roll_call import (
    DONE,
    ENDED,
    RUNNING,
    Beat,
    Finding,
    find_missing,
    find_silent,
)
from megatron_nucleus.training.watchdog.whereabouts import (
    Place,
    place_of_error,
    place_of_thread,
    unfinished_collective,
)
from megatron_nucleus.utils.errors import RankLostError, StoppedError

_ADVICE = "the same command resumes from the newest checkpoint"
# What gloo, NCCL and the store say when the other side is gone or does not answer.
_BROKEN = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out|nccl|socket", re.IGNORECASE)
_LIBRARIES = re.compile(r"\b(gloo|nccl)", re.IGNORECASE)


def watch_ranks(parallel: ParallelState, timeout_s: float) -> Watchdog:
    """A `Watchdog` over all ranks of the run, with the store of the default process group. Every rank calls this."""
    if parallel.control is None:
        return Watchdog(None, 0, 1, timeout_s)
    store = dist.distributed_c10d._get_default_store()
    # What an earlier run wrote may still be there: a store outlives restarts, a process group many runs.
    name = on_first_rank(lambda: uuid.uuid4().hex, parallel.control)
    hosted_by_first = host_and_port(store) is not None and not dist.is_torchelastic_launched()
    return Watchdog(
        dist.PrefixStore(f"watchdog/{name}", store),
        parallel.rank,
        parallel.world,
        timeout_s,
        store_rank=0 if hosted_by_first else None,
    )


def write_error(message: str) -> None:
    """Write one line to stderr, behind an unfinished one, past Python's locks, which a stuck thread may hold."""
    os.write(2, f"\nerror: {message}\n".encode())


class _Position(NamedTuple):
    step: int
    index: int
    phase: str
    allowed_s: float


class Watchdog:
    """Watches the ranks of a run while its ``with`` block runs.

    `at` says what comes next; there is nothing else to call. An error that comes from a lost rank leaves the block as
    `RankLostError`; any other is told to the other ranks, which then end, too. Where no exception can reach the block,
    the process ends with the exit code of `RankLostError` and one line on stderr.

    Args:
        store: reachable by all ranks, with a prefix of its own for each start of the run, because findings stay in
            it; None for a single process, where nothing happens at all.
        timeout_s: how long a rank may be in one phase.
        store_rank: the rank whose process hosts the store; None where the launcher does.
        heartbeat_s: time between two signs of life.
        dead_after_s: a rank without a sign of life for so long is dead. Here and in timeouts, time in which the
            judging process did not run itself (a suspended job) does not count.
        emit: takes the last line of a process that is ended. end: ends it, given the exit code.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world: int,
        timeout_s: float,
        *,
        store_rank: int | None = None,
        heartbeat_s: float = 2.0,
        dead_after_s: float = 15.0,
        emit: Callable[[str], object] = write_error,
        end: Callable[[int], object] = os._exit,
    ):
        if dead_after_s < 4 * heartbeat_s:
            raise ValueError(f"dead_after_s {dead_after_s}: must be 4 heartbeats of {heartbeat_s} s at least")
        self._rank, self._world, self._store_rank = rank, world, store_rank
        self._timeout_s, self._heartbeat_s, self._dead_after_s = timeout_s, heartbeat_s, dead_after_s
        self._emit, self._end = emit, end
        self._store, self._board = store, None
        if store is not None:
            self._board = BulletinBoard(
                store, rank, world, self._beat,
                store_rank=store_rank, heartbeat_s=heartbeat_s, timeout_s=dead_after_s,
            )  # fmt: skip
        self._watched_thread = threading.get_ident()
        self._position = _Position(-1, 0, "start-up", timeout_s)
        self._state = RUNNING
        self._error_place: Place | None = None  # set while the main thread finds out about an error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._judge, name="watchdog-judge", daemon=True)
        # The judge's own:
        self._now_s = 0.0  # time in which this process ran
        self._judged, self._phase_began_s = self._position, 0.0
        self._looks_when_late: int | None = None
        self._answers, self._answered_s = 0, 0.0
        self._cause: Finding | None = None
        self._cause_since_s = 0.0

    def at(self, step: int, phase: str, timeout_s: float | None = None) -> None:
        """Say what this rank does next; it costs about a microsecond.

        Args:
            step: of training.
            phase: in a few words, such as ``backward``. All ranks go through the phases of a step in the same order.
            timeout_s: how long this phase may take, and others may wait for it, if it is not the usual time.
        """
        last = self._position
        index = last.index + 1 if last.step == step else 0
        self._position = _Position(step, index, phase, self._timeout_s if timeout_s is None else timeout_s)

    def lost(self, error: BaseException) -> RankLostError | None:
        """The error to end with if ``error`` is a sign of a lost rank; None if it is this rank's own.

        Waits until the lost rank is known, for little more than ``dead_after_s``. An error of this rank's own is told
        to the others, as by `failed`.
        """
        if self._board is None or isinstance(error, RankLostError):
            return error if isinstance(error, RankLostError) else None
        place = place_of_error(error)
        text = " ".join(str(error).split())
        if not _is_of_a_collective(error, place, text):
            self.failed(error)
            return None
        self._error_place = place
        cause = self._wait_for_cause(self._dead_after_s + 4 * self._heartbeat_s)
        if cause is None:
            if not _BROKEN.search(text):
                self.failed(error)
                return None
            cause = self._agree(self._find_missing())
        where = self._beat(0).where()
        self._state = ENDED
        # gloo begins with its source line and ends with general advice
        reason = re.sub(r"^\[[^\]]*\] ", "", text).split(". ")[0][:200]
        return RankLostError(f"rank {self._rank}: {reason}, {where}; {cause.text}; {_ADVICE}")

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error of its own."""
        if self._board is None or self._state != RUNNING:
            return
        self._error_place = place_of_error(error)
        where = self._beat(0).where()
        self._state = ENDED
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._agree(Finding((self._rank,), f"rank {self._rank} ended {where}: {text}"))

    def __enter__(self) -> Self:
        if self._board is not None:
            self._watched_thread = threading.get_ident()
            self._board.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is None:
            return
        verdict = None
        try:
            if error is None or isinstance(error, StoppedError):  # all ranks stop after the same step
                self._state = DONE
            elif isinstance(error, Exception):
                verdict = self.lost(error)
                self._state = ENDED
            else:
                self.failed(error)
            self._say_goodbye()
        finally:
            self._stop.set()
            self._board.stop()
            self._thread.join(self._heartbeat_s)
        if verdict is not None and verdict is not error:
            raise verdict from error

    def _wait_for_cause(self, limit_s: float) -> Finding | None:
        until_s = self._now_s + limit_s
        while self._cause is None and self._now_s < until_s and self._thread.is_alive():
            time.sleep(self._heartbeat_s / 4)
        return self._cause

    def _agree(self, finding: Finding) -> Finding:
        """Post ``finding``; returns the one that was posted first."""
        self._board.post(finding)
        return self._wait_for_cause(3 * self._heartbeat_s) or finding

    def _say_goodbye(self) -> None:
        """The rank that hosts the store leaves last if it can, so that the others read what they must know."""
        hosts = self._rank == self._store_rank
        limit_s = self._dead_after_s if hosts and self._state == DONE else 3 * self._heartbeat_s
        until_s = self._now_s + limit_s
        while self._now_s < until_s and not self._board.closed:
            if self._board.has_written(self._state) and (not hosts or self._board.all_others_left()):
                return
            time.sleep(self._heartbeat_s / 4)

    def _beat(self, count: int) -> Beat:
        """This rank now. The place is looked up once a phase lasts."""
        step, index, phase, allowed_s = self._position
        seconds = self._now_s - self._phase_began_s if self._judged is self._position else 0.0
        place = self._error_place
        if place is None:
            lasts = seconds > self._heartbeat_s
            place = place_of_thread(self._watched_thread) if lasts else Place("", False)
        return Beat(count, step, index, phase, seconds, allowed_s, *place, self._state)

    # What follows runs in the judge's thread.

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._heartbeat_s / 4):
            now = time.monotonic()
            self._now_s += min(now - last, self._heartbeat_s)
            last = now
            if self._position is not self._judged:
                self._judged, self._phase_began_s = self._position, self._now_s
            if self._cause is None:
                self._cause, self._cause_since_s = self._find_cause(), self._now_s
            elif (
                # The main thread may have got an error and be on its way: then it ends by itself, in order.
                self._state == RUNNING
                and self._error_place is None
                and self._now_s - self._cause_since_s > 3 * self._heartbeat_s
            ):
                self._end_process()
                return

    def _find_cause(self) -> Finding | None:
        board = self._board
        if board.answers != self._answers or board.closed:
            self._answers, self._answered_s = board.answers, self._now_s
        if board.finding is not None:
            return board.finding
        if self._now_s - self._answered_s > self._dead_after_s:
            return self._store_gone()
        if self._state != RUNNING:
            return None
        finding = None
        if not board.closed:
            finding = find_silent(board.seen, self._dead_after_s, 2 * self._heartbeat_s)
        if finding is None and self._is_late():
            finding = self._find_missing()
        if finding is not None and not board.closed:
            board.post(finding)
            return None  # the board says which finding came first
        return finding

    def _is_late(self) -> bool:
        """Whether this rank has waited for longer than it may, and has read where the others are since."""
        board, position = self._board, self._judged
        own = (position.step, position.index)
        alive = [
            s.beat for s in board.seen.values() if s.silent_s < self._dead_after_s and not s.beat.has_left
        ]
        allowed_s = max([position.allowed_s, *(beat.allowed_s for beat in alive if beat.order != own)])
        if not board.observer:
            allowed_s += 4 * self._heartbeat_s  # an observer's finding comes first, if any is left
        board.late = self._now_s - self._phase_began_s > allowed_s
        if not board.late:
            self._looks_when_late = None
            return False
        if self._looks_when_late is None:
            self._looks_when_late = board.full_looks
        return board.closed or board.full_looks > self._looks_when_late + 1

    def _find_missing(self) -> Finding:
        if self._board.closed:
            text = f"rank {self._store_rank} has finished the run and closed the store: nothing is known of the others"
            return Finding((), text)
        return find_missing(self._world, self._board.seen, 3 * self._heartbeat_s)

    def _store_gone(self) -> Finding:
        error = self._board.error
        what = f"is gone ({error})" if error else f"has not answered for {self._dead_after_s:.0f} s"
        address = host_and_port(self._store)
        store = "the rendezvous store" + (f" at {address}" if address else "")
        if self._store_rank is None:
            return Finding((), f"{store} {what}")
        return Finding((self._store_rank,), f"rank {self._store_rank}, which hosts {store}, {what}")

    def _end_process(self) -> None:
        beat, place = self._beat(0), place_of_thread(self._watched_thread)
        where = beat._replace(place=place.text).where()
        collective = None if place.waits else unfinished_collective()
        if collective is not None:
            where += f", the device in {collective}"
        verb = "waited" if place.waits or collective is not None else "for"
        try:
            self._emit(
                f"rank {self._rank}: {verb} {beat.seconds:.0f} s {where}; {self._cause.text}; {_ADVICE}"
            )
            if self._rank == self._store_rank:
                time.sleep(4 * self._heartbeat_s)  # the others read the finding from this process
        finally:
            self._end(RankLostError.exit_code)


def _is_of_a_collective(error: BaseException, place: Place, text: str) -> bool:
    """Whether ``error`` was raised by a collective for a reason that may lie with another rank."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return place.waits or _LIBRARIES.search(text) is not None
