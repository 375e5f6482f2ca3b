"""Regions as ranges that a profiler shows: torch.profiler's and NVTX, for Nsight Systems and Nsight Compute."""

from __future__ import annotations

import torch

from megatron_nucleus.training.profiling.regions import Sink
from megatron_nucleus.utils.errors import ConfigError


class ProfilerRanges:
    """Ranges of ``torch.profiler`` (``user_annotation`` in its trace)."""

    def __init__(self):
        self._open: list[torch.profiler.record_function] = []

    def enter(self, name: str) -> None:
        """Open the range."""
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def leave(self, name: str) -> None:
        """Close the range opened last."""
        self._open.pop().__exit__(None, None, None)


class NvtxRanges:
    """NVTX ranges: ``nsys profile --capture-range=cudaProfilerApi``, ``ncu --nvtx --nvtx-include "experts/"``."""

    def enter(self, name: str) -> None:
        """Push the range onto this thread's stack."""
        torch.cuda.nvtx.range_push(name)

    def leave(self, name: str) -> None:
        """Pop the range pushed last."""
        torch.cuda.nvtx.range_pop()


def nvtx_ranges() -> Sink:
    """`NvtxRanges` where this torch has NVTX.

    Raises:
        ConfigError: this build of torch has none.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--nvtx: torch finds no CUDA device here, and NVTX ranges name what runs on one; without --nvtx "
            "torch.profiler traces the CPU"
        )
    return NvtxRanges()
