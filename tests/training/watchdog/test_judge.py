"""Whose fault it is: ranks in one process, over a store in memory, and errors of every kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.training.watchdog.watchdog import Watchdog
from megatron_nucleus.training.watchdog.whereabouts import (
    place_of_error,
)
from megatron_nucleus.utils.errors import RankLostError, StoppedError

FAST = {"heartbeat_s": 0.15, "dead_after_s": 1.6}
ADVICE = "the same command resumes from the newest checkpoint"


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
