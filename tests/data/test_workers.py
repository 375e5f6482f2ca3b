"""Worker processes that die."""

from __future__ import annotations

import collections
import os
import signal
import threading
import time

import pytest

from megatron_nucleus.data import images
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.data.workers import Batches
from megatron_nucleus.utils.errors import UserError
from tests.data.test_decoders import make_corpus


def test_a_worker_that_is_killed_is_told_in_words(tmp_path, monkeypatch):
    corpus, real = make_corpus(tmp_path / "d"), images.load_pixels
    monkeypatch.setattr(
        images, "load_pixels", lambda *a: (time.sleep(0.02), real(*a))[1]
    )  # here the time goes
    config = DataConfig(data_path="-", resolution_px=32, num_workers=2, prefetch_batches=1)
    before = signal.getsignal(signal.SIGCHLD)
    with build_loader(config, corpus, seed=0, global_batch_size=4, multiple_px=8) as loader:
        next(loader)
        assert signal.getsignal(signal.SIGCHLD) == before  # nothing that raises in the middle of a step
        pid = loader._batches.iterator._workers[0].pid
        timer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(
            UserError, match=rf"^loader worker {pid} was killed \(signal 9\).*--num-workers"
        ) as caught:
            collections.deque(loader, maxlen=0)
        timer.join()
        assert caught.value.exit_code == 1
        with pytest.raises(StopIteration):  # closed
            next(loader)


def test_nothing_is_said_of_workers_that_live_or_of_none():
    class Process:
        pid, exitcode = 7, None

    class Iterator:
        def __init__(self, *exitcodes):
            self._workers = [type("Ended", (Process,), {"exitcode": code})() for code in exitcodes]

    for iterator, said in (
        (iter(()), None),
        (Iterator(None, None), None),
        (Iterator(None, 3), "loader worker 7 ended with code 3; --num-workers 0 shows what happens in it"),
        (Iterator(-11), "loader worker 7 was killed (signal 11); --num-workers 0 shows what happens in it"),
    ):
        batches = Batches(iterator)
        assert batches.why_lost() == said
        batches.stop()
