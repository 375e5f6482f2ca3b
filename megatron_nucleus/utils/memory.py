"""How much memory this process has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device | str | None = None) -> int:
    """Peak memory of this process in bytes.

    Args:
        device: a CUDA device gives the peak of its allocator; None or the CPU gives the peak resident memory of
            the process, interpreter and libraries included (on Linux VmHWM, which unlike ``ru_maxrss`` does not
            start at the size of the process that launched this one).
    """
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
