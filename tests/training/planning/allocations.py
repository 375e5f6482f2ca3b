"""Counts what torch allocates on a CPU, byte by byte, through the profiler's memory events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """peak_bytes: most bytes above those at the start. kept_bytes: what is left of them at the end."""

    peak_bytes = 0
    kept_bytes = 0


@contextlib.contextmanager
def count_allocations() -> Iterator[Allocations]:
    """Count the allocations of the block; the figures are there when it has ended."""
    torch.zeros(1)
    out = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        yield out
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        out.peak_bytes = max(out.peak_bytes, live)
    out.kept_bytes = live
