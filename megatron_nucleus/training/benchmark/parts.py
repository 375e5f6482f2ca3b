"""The parts of a training step, and the clock that runs them in turn on all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_nucleus.core.collectives import gather_rows
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.training.benchmark.roofline import synchronize, timed_s
from megatron_nucleus.training.losses import flow_loss_per_image
from megatron_nucleus.training.profiling.regions import SILENT, Sink, region
from megatron_nucleus.types import TextFeatures


@dataclasses.dataclass(frozen=True)
class Workload:
    """One micro-batch of this rank and how it is computed.

    accumulation: micro-batches per step. bf16: autocast as in training, or bf16 weights where two modules are
    compared (diffusers' module does not run under autocast).
    """

    latents_BSP: Tensor
    sigma_B: Tensor
    text_BLU: Tensor
    target_BSP: Tensor
    grid: tuple[int, int]
    accumulation: int
    bf16: bool


class Timed:
    """A module and its call as two parts, forward (no gradients) and forward + backward, with one loss for all."""

    def __init__(self, module: nn.Module, call: Callable[[], Tensor], work: Workload):
        self.module, self.call, self.work = module, call, work
        self.autocast = work.bf16 and work.latents_BSP.dtype == torch.float32

    def forward(self) -> Tensor:
        """Velocity without gradients."""
        with torch.no_grad(), self._precision():
            velocity_BSP = self.call()
        # Only a backward pass frees all gathered weights, and the next part must gather its own.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return velocity_BSP

    def forward_backward(self, first: bool = True, last: bool = True, sink: Sink = SILENT) -> None:
        """Gradients of the velocity MSE in ``module``.

        Args:
            first: whether it is a step's first micro-batch, whose gradients are fresh; those of the others are added.
            last: whether it is its last one, of which copies of the weights on other ranks learn.
            sink: hears of ``forward`` and ``backward``.
        """
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
        if first:
            for p in self.module.parameters():
                p.grad = None
        with region(sink, "forward"):
            with self._precision():
                velocity_BSP = self.call()
            loss = flow_loss_per_image(velocity_BSP, self.work.target_BSP).mean()
        with region(sink, "backward"):
            loss.backward()

    def _precision(self) -> contextlib.AbstractContextManager:
        device_type = self.work.latents_BSP.device.type
        return torch.autocast(device_type, torch.bfloat16) if self.autocast else contextlib.nullcontext()


def call_ours(model: NucleusTransformer, work: Workload) -> Tensor:
    """Velocity [B, S, P] of our module."""
    return model(work.latents_BSP, work.sigma_B, TextFeatures(work.text_BLU), work.grid)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of one part: median, quartiles and least of ``repeats`` runs."""

    median_s: float
    p25_s: float
    p75_s: float
    min_s: float
    repeats: int


def spread(seconds: list[float]) -> Spread:
    """Summary of one part's times."""
    ordered = sorted(seconds)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(statistics.median(ordered), quartiles[0], quartiles[2], ordered[0], len(ordered))


def interleave(
    parts: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    device: torch.device,
    control: dist.ProcessGroup | None = None,
    after: Callable[[str], None] = lambda name: None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Spread]:
    """Run all parts in turn, ``warmup`` rounds untimed and ``repeats`` rounds timed; every other round backwards.

    Several ranks start each part together, and a part's time is that of the rank that took longest.

    Args:
        parts: by name; every rank has the same ones in the same order.
        control: gloo group of all ranks; None for a single process.
        after: called with a part's name behind each run of it, untimed.
        clock: seconds of one call; None = `roofline.timed_s`, from an idle device to an idle device.
    """
    clock = clock or functools.partial(timed_s, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_number in range(warmup + repeats):
        for name in list(parts) if round_number % 2 == 0 else reversed(list(parts)):
            if control is not None:
                synchronize(device)
                dist.barrier(control)
            elapsed_s = clock(parts[name])
            after(name)
            if round_number >= warmup:
                seconds[name].append(elapsed_s)
    return {name: spread(largest(values, control)) for name, values in seconds.items()}


def largest(values: Sequence[float], control: dist.ProcessGroup | None) -> list[float]:
    """Of each value the largest that any rank has, the same on all of them; whole numbers are exact up to 2^53."""
    return gather_rows(torch.tensor(values, dtype=torch.float64), control).amax(0).tolist()
