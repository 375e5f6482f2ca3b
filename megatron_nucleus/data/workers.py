"""Worker processes of a loader: signals, an end with the program, and what is said of one that died."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from megatron_nucleus.data.samples import Made
from megatron_nucleus.utils.errors import DataError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_S = 120  # a worker told to end lives on this long, so that the program can finish its step and save
_REAP_S = 1.0  # a worker's end is noticed here a moment after its connection is gone; own choice


class Batches:
    """A DataLoader iterator that is stopped for certain, once: by close, by dropping the loader, or at exit.

    Dropping the iterator alone is not enough: the traceback of an error keeps it alive. At exit, workers must be
    gone before multiprocessing's own exit handler waits for them; handlers registered later run earlier.
    """

    def __init__(self, iterator: Iterator[Made | DataError]):
        self.iterator = iterator
        atexit.register(self.stop)

    def why_lost(self) -> str | None:
        """What happened to a worker that did not end by itself, in one line; None when all are well."""
        workers = getattr(self.iterator, "_workers", ())
        until = time.monotonic() + _REAP_S
        while workers and time.monotonic() < until:
            for worker in workers:
                if worker.exitcode:
                    return _obituary(worker.pid, worker.exitcode)
            time.sleep(_REAP_S / 20)
        return None

    def stop(self) -> None:
        """End the workers, or the thread."""
        iterator, self.iterator = self.iterator, iter(())
        atexit.unregister(self.stop)
        # absent when there are neither workers nor a thread
        shutdown = getattr(iterator, "_shutdown_workers", getattr(iterator, "close", None))
        if shutdown is not None:
            shutdown()


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Keep SIGINT and SIGTERM pending, here and in the workers started meanwhile, until `start_worker` is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deaths_told_by_next() -> Iterator[None]:
    """Undo the SIGCHLD handler that DataLoader sets in this block.

    It raises wherever the program is, in the middle of an update or of a checkpoint. Without it a dead worker is an
    error of the next ``next``.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def start_worker(_: int, parent: int) -> None:
    """The main process decides when to stop: a signal to the group must not kill its loader first.

    Args:
        parent: process id of the program that owns the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    _end_with_parent(parent)


def _end_with_parent(parent: int) -> None:
    """Linux: the kernel kills this worker when the process that started it is gone, however that ended.

    Elsewhere DataLoader's own watch remains, which looks only between two batches, and which misses a parent that
    was gone before the worker came up.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the worker came this far
        os._exit(1)


def _obituary(pid: int | None, exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        ending = "was killed (signal 9), as the system does when memory runs out"
        advice = "use fewer --num-workers or --prefetch-batches, or give the job more memory"
    else:
        ending = f"was killed (signal {-exitcode})" if exitcode < 0 else f"ended with code {exitcode}"
        advice = "--num-workers 0 shows what happens in it"
    return f"loader worker {pid} {ending}; {advice}"
