"""What a run says when its device has no memory left: what was asked for, which part took most, what to change.

The forecast is the planner's (`planning/`), for this very run: its ranks, its micro-batch, its backends.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.ops import registry
from megatron_nucleus.ops.table import AUTO_ORDER
from megatron_nucleus.training.arguments import RunConfig, batch_split
from megatron_nucleus.training.planning import images, memory, step_time
from megatron_nucleus.training.planning.advice import cheapest_change
from megatron_nucleus.training.planning.devices import GPUS, Links, network_bytes_per_s
from megatron_nucleus.training.planning.ledger import FUSABLE, MicroBatch
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.plan import DEFAULT_GPU, PlanConfig, peak_flops, shape_of, work_with
from megatron_nucleus.training.watchdog.whereabouts import place_of_error
from megatron_nucleus.types import Batch
from megatron_nucleus.utils.errors import ConfigError, UserError
from megatron_nucleus.utils.memory import peak_memory_bytes

log = logging.getLogger(__name__)

# How allocators that raise no `torch.OutOfMemoryError` say it: torch's on a CPU, CUDA's own, cuBLAS for its workspace.
_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
CPU_OTHER_BYTES = 1 << 30  # interpreter, libraries and data workers of a rank on a CPU (own choice)
# Where the forecast fits and the device is full all the same, something is not in it; a change must save so much.
LESS_FRAC = 0.1  # own choice


class OutOfMemory(UserError):
    """The device has no memory left for this configuration."""

    exit_code = ConfigError.exit_code


class MemoryGuard:
    """Turns an allocation that fails inside its ``with`` block into an `OutOfMemory` that says what to change.

    Any other error passes. Nothing that goes wrong while the message is made hides the first error, which is the
    cause of what is raised.

    Attributes:
        shape, batch, step: the run's architecture, micro-batch in work and step, as far as they are known; before
            that, those of the configuration.
    """

    def __init__(self, run: RunConfig, parallel: ParallelState):
        self.run, self.parallel = run, parallel
        self.shape: ModelShape | None = None
        self.batch: MicroBatch | None = None
        self.step = 0

    def at(self, step: int, batch: Batch) -> None:
        """Say which micro-batch comes next."""
        self.step = step
        self.batch = MicroBatch(*batch.latents_BSP.shape[:2], batch.text.features_BLU.shape[1])

    def __enter__(self) -> MemoryGuard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and is_out_of_memory(error):
            raise OutOfMemory(self.explain(error)) from error

    def explain(self, error: BaseException) -> str:
        """One line: what failed, where, the peak, the forecast and the cheapest change."""
        parts = [_told(part, error) for part in (self._what, self._peak, self._forecast, self._advice)]
        return "; ".join(part for part in parts if part)

    def work(self) -> Work:
        """This run as the planner sees it."""
        run, layout, device_type = self.run, self.parallel.layout, self.parallel.device.type
        shape = self.shape or shape_of(run)
        micro, accumulation = batch_split(run, layout.world)
        batch = self.batch
        if batch is None:
            sizes = images.sizes_of(run, None, shape)
            batch = MicroBatch(micro, max(sizes.values()), PlanConfig.text_tokens)
        usable = usable_backends(device_type)
        return work_with(run, shape, layout, batch, accumulation, device_type, usable)

    def _what(self, error: BaseException) -> str:
        where = place_of_error(error).text
        step = f" in step {self.step}" if self.step else " before the first step"
        asked = asked_bytes(error)
        text = (
            f"{size(asked)} more were asked for" if asked is not None else " ".join(str(error).split())[:200]
        )
        return f"out of memory on rank {self.parallel.rank}{step}, {where}: {text}"

    def _peak(self, error: BaseException) -> str:
        device = self.parallel.device
        held = "torch held" if device.type == "cuda" else "the process held"
        return f"at most {held} {size(peak_memory_bytes(device))} of {size(capacity_bytes(device))} before"

    def _forecast(self, error: BaseException) -> str:
        work = self.work()
        parts = memory.peak(work)
        named = ", ".join(f"{name} {size(count)}" for name, count in parts._asdict().items())
        largest = max(parts._asdict().items(), key=lambda part: part[1])[0]
        return (
            f"forecast of a rank's fullest moment ({_setting(work)}): {named}, together {size(parts.total)}; "
            f"most of it {largest}"
        )

    def _advice(self, error: BaseException) -> str:
        work, usable = self.work(), self._usable_bytes()
        total = memory.peak(work).total
        limit = min(usable, round((1 - LESS_FRAC) * total))
        fixed = self.run.precision.fp8_recipe == "delayed"  # it cannot be recomputed (`core/precision`)
        found = cheapest_change(work, limit, _seconds(self.run), fixed_recompute=fixed)
        known = (
            f"of {size(usable)} usable"
            if total > usable
            else f"which {size(usable)} should hold: more is held beside it"
        )
        if found is None:
            return f"forecast {known}; no smaller setting fits: take more GPUs, or larger ones (tools/plan.py --search)"
        return (
            f"cheapest change that is expected to fit: {' '.join(found.flags)} ({size(found.total_bytes)}; forecast "
            f"{known}); tools/plan.py --search shows others"
        )

    def _usable_bytes(self) -> int:
        device = self.parallel.device
        margin = PlanConfig.memory_margin_frac
        other = CPU_OTHER_BYTES if device.type == "cpu" else round(PlanConfig.other_memory_gib * 2**30)
        return max(0, round(capacity_bytes(device) * (1 - margin)) - other)


def _told(part: Callable[[BaseException], str], error: BaseException) -> str:
    """A part of the message, or why there is none: its failure must not hide the error it is about."""
    try:
        return part(error)
    except Exception as failure:
        log.debug("no %s of an out-of-memory error", part.__name__, exc_info=True)
        return f"(no {part.__name__.strip('_')}: {type(failure).__name__}: {' '.join(str(failure).split())[:120]})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch, CUDA or cuBLAS found no memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def asked_bytes(error: BaseException) -> int | None:
    """Size of the allocation that failed, None where the message does not say it."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found and found[2].lower() in _UNITS else None


def capacity_bytes(device: torch.device) -> int:
    """Memory that one rank may fill: of the GPU; on a CPU the least of what machine, control group and limits allow."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    shared = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and group.read_text().strip().isdigit():
        shared.append(int(group.read_text()))
    own = min(shared) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return own if limit == resource.RLIM_INFINITY else min(own, limit)


def usable_backends(device_type: str) -> frozenset[str]:
    """Backends of ``auto`` that serve any of the planner's operations here."""
    return frozenset(
        row.backend
        for op in FUSABLE
        for row in registry.backends(op)
        if row.backend in AUTO_ORDER.get(device_type, ("torch",))
        and device_type in row.devices.split()
        and registry.why_unavailable(op, row.backend, device_type=device_type) is None
    )


def _seconds(run: RunConfig) -> Callable[[Work], float]:
    """Forecast of a step's time, to compare settings: on this GPU if the table has it, else on the default one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = next((g for g in reversed(GPUS.values()) if g.name in name), GPUS[DEFAULT_GPU])
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, device=DEFAULT_GPU))
    c = PlanConfig
    fp8 = run.precision.fp8 != "none" and gpu.fp8_tflops is not None
    speed = step_time.rates(
        gpu, peak_flops(run), c.matmul_efficiency, c.attention_efficiency, c.memory_efficiency, fp8=fp8
    )
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", c.gpus_per_node))
    rates = (gpu.link_bytes_per_s, network_bytes_per_s(c.network))
    links = Links(*(rate * c.link_efficiency for rate in rates), per_node)
    return lambda work: step_time.forecast(work, speed, links).step_s


def _setting(work: Work) -> str:
    batch = work.batch
    return (
        f"{work.layout.world} ranks, EP {work.layout.ep}, micro-batch {batch.images} x {work.accumulation}, recompute "
        f"{work.recompute}, {batch.tokens} image + {batch.text_tokens} text tokens"
    )


def size(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
