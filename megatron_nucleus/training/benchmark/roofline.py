"""What this machine can do at most, measured: the best of some matrix products, and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# Own choice. The largest is not the fastest everywhere: on 2 shared cores of an AMD EPYC one thread reached 102 GFLOP/s
# at 512, whose three matrices fit into its cache, and 37 at 1024; a GPU may slow down under the power of a large one.
MATMUL_SIDES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192, 16384)}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}  # own choice: far more than any cache holds
REPEATS = 10
# Written before an operation on a GPU: many times its L2 cache (50 MB on an H200), and some 0.2 ms of work there, in
# which the host hands over what is timed. Own choice.
FLUSH_BYTES = 2**30


class Ceilings(NamedTuple):
    """Best of `REPEATS`: FLOP/s of square products of `MATMUL_SIDES`, bytes/s read and written by a copy."""

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
    best = max(matmul_flops_per_s(side, device, dtype) for side in MATMUL_SIDES[device])
    return Ceilings(best, copy_bytes_per_s(COPY_BYTES[device], device))


def matmul_flops_per_s(side: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of ``side``."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / best_s(lambda: torch.mm(a, b, out=out), device)


def copy_bytes_per_s(size_bytes: int, device: str) -> float:
    """Bytes read and written per second by a copy of ``size_bytes``."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size_bytes / best_s(lambda: target.copy_(source), device)


def best_s(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Shortest of ``repeats`` times behind one that is not counted."""
    clock = OpClock(device)
    return min([clock(call) for _ in range(repeats + 1)][1:])


class OpClock:
    """Seconds of one operation, which may be far shorter than its launch.

    On a GPU: between two events behind a write of `FLUSH_BYTES`. The operation finds nothing of its data in the
    cache, and the host's time is in the figure only where the host is slower than the write and the operation
    together. On a CPU: `timed_s`.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.flushed = None
        if self.device.type == "cuda":
            self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.flushed is None:
            return timed_s(call, self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(self.device)
        self.flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timed_s(call: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one call on the host's clock, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device | str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
