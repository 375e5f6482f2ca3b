"""Runs a function on several gloo ranks, each a process of its own, forked from a server that has torch loaded."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Another process may take the very port that gloo has just chosen: rare, and no fault of what is tested.
MEETINGS = 3
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(
    world: int, function: Callable, folder: Path, *args: Any, timeout_s: float = 120.0, **kwargs: Any
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``world`` ranks at once; returns what each returned, in rank order.

    The default process group is initialised (gloo). Whatever happens, no process is left behind.

    Args:
        function: importable by its name (a function at the top of a test file). Its result must be picklable;
            tensors come back as plain values.
        folder: where the ranks meet; `tmp_path`.

    Raises:
        AssertionError: a rank raised (with its traceback) or did not return within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(MEETINGS - 1):
        try:
            return _run_once(world, function, folder, args, kwargs, deadline)
        except _NoMeeting:
            continue
    return _run_once(world, function, folder, args, kwargs, deadline)


class _NoMeeting(AssertionError):
    """The ranks found no way to one another, before anything was called."""


def _run_once(
    world: int, function: Callable, folder: Path, args: tuple, kwargs: dict, deadline: float
) -> list[Any]:
    meeting = folder / f"meeting_{uuid.uuid4().hex}"
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _CONTEXT.Process(
            target=_rank_main, args=(rank, world, str(meeting), pipes[rank][1], function, args, kwargs)
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        return _collect([reader for reader, _ in pipes], deadline)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not return in time"
        for reader in ready:
            rank = waiting[reader]
            try:
                outcome, value = reader.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a word") from None
            if outcome == "no meeting":
                raise _NoMeeting(f"rank {rank}:\n{value}")
            assert outcome == "returned", f"rank {rank}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _rank_main(
    rank: int, world: int, meeting: str, writer: Connection, function: Callable, args: tuple, kwargs: dict
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    outcome = "no meeting"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        outcome = "raised"
        writer.send(("returned", function(*args, **kwargs)))
    except BaseException:
        writer.send((outcome, traceback.format_exc()))
    writer.close()
    os._exit(0)  # no orderly goodbye: another rank may have failed


class Launch:
    """``tools/train.py ARGV`` on several ranks, as a launcher starts it: exit codes, signals and stderr are real.

    Use it as a context manager; no process outlives it. Rank 0 hosts the rendezvous store.

    Args:
        folder: of this launch; ``rank_0.err`` and so on hold what the ranks wrote to stderr.
        before: importable function called as ``before(rank)`` in each rank first, to break something in it.
    """

    def __init__(self, world: int, argv: list, folder: Path, before: Callable | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_tool_main, args=(rank, world, port, list(map(str, argv)), str(folder), before)
            )
            for rank in range(world)
        ]

    def __enter__(self) -> Launch:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def exit_codes(self, timeout_s: float = 90.0) -> list[int]:
        """Of all ranks, once all have ended; negative where a signal ended one."""
        deadline = time.monotonic() + timeout_s
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} still runs: {self.stderr(rank)[-2000:]}"
        return [process.exitcode for process in self.processes]

    def stderr(self, rank: int) -> str:
        """What a rank wrote to stderr so far."""
        path = self.folder / f"rank_{rank}.err"
        return path.read_text(errors="replace") if path.exists() else ""


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tool_main(
    rank: int, world: int, port: int, argv: list[str], folder: str, before: Callable | None
) -> None:
    import torch

    from megatron_nucleus.utils import cli
    from tools.train import main

    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/rank_{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if before is not None:
        before(rank)
    cli.run(lambda: main(argv), "the same command goes on from the newest checkpoint")
