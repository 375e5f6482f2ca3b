"""How long the parts of training take, without waiting for the device in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Pace(NamedTuple):
    """Over ``steps`` steps: seconds of one, images of all ranks per second, FLOP/s of this rank."""

    steps: int
    step_s: float
    samples_per_s: float
    flops_per_s: float


class StepTimer:
    """Mean step time between two log rows, without the pauses for saving and previews."""

    def __init__(self):
        self._reset()
        self._mark = time.perf_counter()

    def add(self, samples: int, step_flops: int) -> None:
        """Count one step that ends now."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1
        self._samples += samples
        self._flops += step_flops

    def exclude_pause(self) -> None:
        """What happened since the last `add` was no training."""
        self._mark = time.perf_counter()

    def take(self) -> Pace:
        """Means since the last call."""
        out = Pace(
            self._steps,
            self._seconds / self._steps,
            self._samples / self._seconds,
            self._flops / self._seconds,
        )
        self._reset()
        return out

    def _reset(self) -> None:
        self._seconds, self._steps, self._samples, self._flops = 0.0, 0, 0, 0


class PartTimer:
    """Mean seconds of one part of a step, such as the optimizer; on CUDA by events, read when asked."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._spans: list = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time the block."""
        start = self._mark()
        yield
        self._spans.append((start, self._mark()))

    def take(self) -> float | None:
        """Mean seconds since the last call; None if the part never ran."""
        spans, self._spans = self._spans, []
        if not spans:
            return None
        if not self.on_gpu:
            return sum(end - start for start, end in spans) / len(spans)
        spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / len(spans) / 1e3

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
