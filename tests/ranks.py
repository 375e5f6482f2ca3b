"""Runs a function on several gloo ranks, each a process of its own, forked from a server that has torch loaded."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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
        return _collect([reader for reader, _ in pipes], time.monotonic() + timeout_s)
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
                failed, value = reader.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a word") from None
            assert not failed, f"rank {rank}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _rank_main(
    rank: int, world: int, meeting: str, writer: Connection, function: Callable, args: tuple, kwargs: dict
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        writer.send((False, function(*args, **kwargs)))
    except BaseException:
        writer.send((True, traceback.format_exc()))
    writer.close()
    os._exit(0)  # no orderly goodbye: another rank may have failed
