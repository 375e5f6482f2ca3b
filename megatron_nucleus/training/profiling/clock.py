"""How long the regions of a step take, their own time and that of what is inside."""

from __future__ import annotations

import itertools
import time

import torch


class Clock:
    """A sink (`regions.py`) that adds up time; on CUDA by events of the current stream, read by `take` alone.

    On CUDA a region's time is that between two places of the compute stream, waiting for other streams included.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple] = []  # (when, what was open until then)

    def enter(self, name: str) -> None:
        """The region begins."""
        self._note()
        self._open.append(name)

    def leave(self, name: str) -> None:
        """The region ends.

        Raises:
            RuntimeError: another region is open.
        """
        self._note()
        if not self._open or self._open[-1] != name:
            raise RuntimeError(f"region '{name}' ends, but open are {self._open}")
        self._open.pop()

    def take(self) -> dict[tuple[str, ...], float]:
        """Own seconds of every path of open regions, outermost first, since the last call. Waits for the device.

        The times of all paths under a name add up to the whole time that this name was open.
        """
        marks, self._marks = self._marks, []
        if self.on_gpu and marks:
            marks[-1][0].synchronize()
        seconds: dict[tuple[str, ...], float] = {}
        for (start, _), (end, path) in itertools.pairwise(marks):
            if path:
                elapsed_s = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
                seconds[path] = seconds.get(path, 0.0) + elapsed_s
        return seconds

    def _note(self) -> None:
        if self.on_gpu:
            when = torch.cuda.Event(enable_timing=True)
            when.record()
        else:
            when = time.perf_counter()
        self._marks.append((when, tuple(self._open)))
