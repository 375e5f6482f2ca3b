"""Where a thread is, and in which collective."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

import megatron_nucleus
from megatron_nucleus.training.watchdog.whereabouts import (
    Line,
    find_place,
    place_of_thread,
    unfinished_collective,
)

DISTRIBUTED = dist.distributed_c10d.__file__


def test_the_collective_is_named_with_the_line_that_called_it():
    package = Path(megatron_nucleus.__file__).parent
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


def test_no_garbage_is_collected_while_frames_are_taken(monkeypatch):
    """A collection inside of `sys._current_frames` that frees a tensor can stop the whole process (Python 3.11)."""
    during = []
    monkeypatch.setattr(sys, "_current_frames", lambda: during.append(gc.isenabled()) or {})
    assert gc.isenabled()
    place_of_thread(1)
    assert (during, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        place_of_thread(1)
        assert not gc.isenabled()
    finally:
        gc.enable()


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
