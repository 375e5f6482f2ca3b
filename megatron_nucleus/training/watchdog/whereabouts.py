"""Where a program is right now, or was when an error was raised: which collective, called from which line."""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch._C import _distributed_c10d as c10d

import megatron_nucleus

_PACKAGE = Path(megatron_nucleus.__file__).parent
_TORCH = Path(torch.__file__).parent
# Modules of torch whose innermost function is the collective that a stack waits in.
_COLLECTIVE_FILES = ("distributed/distributed_c10d.py", "distributed/_functional_collectives.py",
                     "distributed/nn/functional.py")  # fmt: skip
_COLLECTIVE_FOLDERS = ("distributed/fsdp/",)
_DUMP_LIMIT_S = 20.0
_COLLECTOR = threading.Lock()  # held while the garbage collector is switched off


class Line(NamedTuple):
    """One level of a call stack."""

    file: str
    number: int
    function: str


class Place(NamedTuple):
    """text: such as ``in all_reduce (core/collectives.py:88)`` or ``at data/loader.py:31 in __next__``.

    waits: whether it is a collective, so that others may be what it waits for.
    """

    text: str
    waits: bool


def find_place(stack: list[Line]) -> Place:
    """The collective in ``stack`` (innermost line first) and its caller, else the innermost line of this package."""
    for depth, line in enumerate(stack):
        if _is_collective(line.file):
            caller = next((x for x in stack[depth:] if not _inside(line=x, folder=_TORCH)), line)
            return Place(f"in {line.function} ({_short(caller)})", True)
    if not stack:
        return Place("", False)
    own = next((line for line in stack if _inside(line, _PACKAGE)), stack[0])
    return Place(f"at {_short(own)} in {own.function}", False)


def place_of_thread(thread: int) -> Place:
    """Where the thread of this identifier is.

    A backward pass on a GPU runs Python functions in threads of autograd while its caller waits: these count as well.
    """
    frames = _current_frames()
    if thread not in frames:
        return Place("", False)
    stack = _stack(frames[thread])
    place = find_place(stack)
    if place.waits or not stack or not stack[0].file.endswith("torch/autograd/graph.py"):
        return place
    known = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)}
    autograd = (find_place(_stack(frame)) for ident, frame in frames.items() if ident not in known)
    return next((found for found in autograd if found.waits), place)


def _current_frames() -> dict[int, FrameType]:
    """`sys._current_frames` without a garbage collection inside.

    Python 3.11 holds the lock over all threads while it builds the answer. A collection that begins there and frees a
    tensor lets another thread run; where that one needs the lock, too, both wait for ever (CPython issue 106883).
    """
    with _COLLECTOR:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()


def place_of_error(error: BaseException) -> Place:
    """Where ``error`` was raised."""
    walk = traceback.walk_tb(error.__traceback__)
    stack = [Line(f.f_code.co_filename, number, f.f_code.co_name) for f, number in walk]
    return find_place(stack[::-1])


def unfinished_collective() -> str | None:
    """The oldest collective that has begun and not ended, as torch's flight recorder knows it; None if it knows none.

    On GPUs a program runs ahead of its collectives, so that its Python line says little; this name is the right one.
    A driver that hangs in this question ends the process with the stacks of all its threads.
    """
    faulthandler.dump_traceback_later(_DUMP_LIMIT_S, file=2, exit=True)
    try:
        entries: list[dict] = []
        for dump in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
            if hasattr(c10d, dump):
                entries += json.loads(getattr(c10d, dump)(True, True)).get("entries", [])
        waiting = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
        if not waiting:
            return None
        oldest = min(waiting, key=lambda entry: entry["time_created_ns"])
        return f"{oldest['profiling_name']} {oldest['input_sizes']} of group {oldest['process_group'][1]}"
    except (ValueError, KeyError, IndexError, RuntimeError):
        return None  # torch promises no format; a missing name must not hide the message it belongs to
    finally:
        faulthandler.cancel_dump_traceback_later()


def _stack(frame: FrameType | None) -> list[Line]:
    lines = []
    # Seen with CPython 3.11: a thread that is just entering a call may be listed with an object that is no frame.
    while hasattr(frame, "f_code"):
        lines.append(Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return lines


def _inside(line: Line, folder: Path) -> bool:
    return line.file.startswith(f"{folder}/")


def _is_collective(file: str) -> bool:
    if file == str(_PACKAGE / "core/collectives.py"):
        return True
    if not file.startswith(f"{_TORCH}/"):
        return False
    inside = file.removeprefix(f"{_TORCH}/")
    return inside in _COLLECTIVE_FILES or inside.startswith(_COLLECTIVE_FOLDERS)


def _short(line: Line) -> str:
    path = Path(line.file)
    parts = path.relative_to(_PACKAGE).parts if _inside(line, _PACKAGE) else path.parts[-2:]
    return f"{'/'.join(parts)}:{line.number}"
