"""What this machine can do at most, measured: a large matrix product and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # own choice: well beyond the size where the rate stops growing
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # own choice: far more than any cache holds
REPEATS = 10


class Ceilings(NamedTuple):
    """Best of `REPEATS`: FLOP/s of a square matrix product in ``dtype``, bytes/s read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, flops: int, moved_bytes: int) -> float:
        """Least seconds of an operation with these costs."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)

    def near(self, moved_bytes: int, device: str) -> Ceilings:
        """The same for work on so few bytes that they stay in a cache: the rate of a copy of that size, if higher."""
        if moved_bytes >= 2 * COPY_BYTES[device]:
            return self
        rate = copy_bytes_per_s(max(1, moved_bytes // 2), device)
        return self._replace(bytes_per_s=max(self.bytes_per_s, rate))


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Run both now, on the threads that torch has now."""
    side = MATMUL_SIDE[device]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.float32).to(dtype).unbind()
    out = torch.empty_like(a)
    matmul_s = best_s(lambda: torch.mm(a, b, out=out), device)
    return Ceilings(2 * side**3 / matmul_s, copy_bytes_per_s(COPY_BYTES[device], device))


def copy_bytes_per_s(size_bytes: int, device: str) -> float:
    """Bytes read and written per second by a copy of ``size_bytes``."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size_bytes / best_s(lambda: target.copy_(source), device)


def best_s(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Shortest of ``repeats`` times behind one that is not counted."""
    best = float("inf")
    for number in range(repeats + 1):
        seconds = timed_s(call, device)
        if number:
            best = min(best, seconds)
    return best


def timed_s(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
