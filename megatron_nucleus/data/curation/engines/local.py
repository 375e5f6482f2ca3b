"""A pool of processes on this machine; with one worker no pool at all."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_nucleus.data.curation.engines import WorkerDied

_DIED = WorkerDied("the process ended")


class LocalEngine:
    """`engines.Engine` over ``workers`` processes, which start with the first `map` and stay until `close`."""

    def __init__(self, workers: int, pool: bool = True):
        """pool: False runs all in this process, which a decoder that crashes then takes down with it."""
        self.workers, self.pool = workers, pool
        self._pool: ProcessPoolExecutor | None = None
        self._shape = (0, 0.0)

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], gpus: float = 0.0
    ) -> Iterator[tuple[Any, Any]]:
        """See `engines.Engine`; two tasks per worker are in flight."""
        workers = self.workers if not gpus else max(1, int(visible_gpus() / gpus))
        if not self.pool:
            yield from ((task, function(task)) for task in tasks)
            return
        submitted = 0
        running: dict[Future, Any] = {}
        while True:
            pool = self._open(workers, gpus)
            try:
                while len(running) < 2 * workers and submitted < len(tasks):
                    running[_submit(pool, function, tasks[submitted])] = tasks[submitted]
                    submitted += 1
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
            except BrokenProcessPool:  # one process died, and the pool with it: all in flight may be to blame
                self.close()
                suspects, running = list(running.values()), {}
                yield from ((task, _DIED) for task in suspects)

    def alone(self, function: Callable[[Any], Any], task: Any, gpus: float = 0.0) -> Any:
        """See `engines.Engine`; always in a process of its own."""
        with _pool(1, gpus) as pool:
            try:
                return _submit(pool, function, task).result()
            except BrokenProcessPool:
                return _DIED

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _open(self, workers: int, gpus: float) -> ProcessPoolExecutor:
        if self._pool is None or self._shape != (workers, gpus):
            self.close()
            self._pool, self._shape = _pool(workers, gpus), (workers, gpus)
        return self._pool


def visible_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def _pool(workers: int, gpus: float = 0.0) -> ProcessPoolExecutor:
    context = get_context("forkserver")  # fork of a process with threads can hang
    context.set_forkserver_preload(["megatron_nucleus.data.curation.runner"])
    started = context.Value("i", 0)
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(started, gpus)
    )


def _submit(pool: ProcessPoolExecutor, function: Callable[[Any], Any], task: Any) -> Future:
    """``pool.submit``. While a pool is taken down after a death, its pipes may fail before it says it is broken."""
    try:
        return pool.submit(function, task)
    except OSError as error:
        if error.errno is not None:  # the system's own: no memory or no file descriptor for another process
            raise
        raise BrokenProcessPool(str(error)) from error


def _start_worker(started: Any, gpus: float) -> None:
    """The main process handles signals; a worker leaves when the main process is gone, and sees its own GPUs only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Every worker has a core: a model that took all of them would only make the others wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _choose_gpus(number, gpus)

    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when the main one has ended, also where nobody has waited for it yet."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _choose_gpus(worker: int, gpus: float) -> None:
    """Narrow CUDA_VISIBLE_DEVICES to this worker's share; whole GPUs, or a part of one when ``gpus`` is below 1."""
    if not gpus:
        return
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(i) for i in range(visible_gpus())]
    share = max(1, round(gpus))
    first = int(worker * gpus) % max(1, len(names))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + share])
