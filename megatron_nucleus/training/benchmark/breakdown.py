"""A whole training step as it runs in training, and where its time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.optimizer import Optimizer
from megatron_nucleus.training.benchmark.parts import Spread, Timed, Workload, largest, spread
from megatron_nucleus.training.profiling.clock import Clock
from megatron_nucleus.training.profiling.regions import REGIONS, STEP_PARTS, Sink, named_regions, region

# Sent to and fro: `dispatch` and `combine` together, forward and backward.
EXCHANGE = "dispatch_combine"
_EXCHANGING = ("dispatch", "combine")


class Step:
    """One optimizer step on random inputs: ``accumulation`` times data, forward and backward, then the optimizer.

    Args:
        timed: the model and its micro-batch.
        optimizer: None = the step ends behind the last backward pass. clip_grad: of `clip_gradients`.
        data: what brings a micro-batch (`draw_noise`, or a loader's next); its result is dropped.
        group: all ranks; None for one process.
    """

    def __init__(
        self,
        timed: Timed,
        optimizer: Optimizer | None,
        clip_grad: float,
        data: Callable[[], object],
        group: dist.ProcessGroup | None = None,
        *,
        compiled: bool = False,
    ):
        self.timed, self.optimizer, self.clip_grad = timed, optimizer, clip_grad
        self.data, self.group, self.compiled = data, group, compiled

    def __call__(self, sink: Sink) -> None:
        """Run it; ``sink`` hears of `STEP_PARTS`, and of the regions inside while `named` is open."""
        accumulation = self.timed.work.accumulation
        for number in range(accumulation):
            with region(sink, "data"):
                self.data()
            self.timed.forward_backward(last=number == accumulation - 1, sink=sink)
        if self.optimizer is not None:
            # Clipping belongs to it, as in the timed parts.
            with region(sink, "optimizer"):
                clip_gradients(self.optimizer.params.values(), self.clip_grad, self.group)
                self.optimizer.step(1e-6)

    @contextlib.contextmanager
    def named(self, sink: Sink) -> Iterator[None]:
        """Report the model's regions to ``sink`` inside the block."""
        with named_regions(self.timed.module, sink, compiled=self.compiled):
            yield


def draw_noise(work: Workload, model: NucleusTransformer) -> Callable[[], object]:
    """What every micro-batch costs before the model even where data are free: noise and noise levels of its images,
    drawn on the host as `training/step.py` draws them, and sent to the device together with latents and text.
    """
    device = work.latents_BSP.device
    host = [work.latents_BSP.cpu(), work.text_BLU.cpu()]
    B, S, _ = work.latents_BSP.shape
    draws, levels = tuple(range(B)), flow.FlowConfig()

    def data() -> list[torch.Tensor]:
        noise_BSP = flow.sample_noise(0, draws, (S, model.shape.patch_channels))
        sigma_B = flow.sample_sigma(levels, 0, draws, S)
        return [t.to(device, non_blocking=True) for t in (*host, noise_BSP, sigma_B)]

    return data


def time_breakdown(
    step: Step, repeats: int, warmup: int, device: torch.device, control: dist.ProcessGroup | None
) -> dict[str, Spread]:
    """Seconds of a step's parts: ``step``, its `STEP_PARTS`, and of what is inside of these `REGIONS` and `EXCHANGE`.

    The parts of a step add up to it, in every repetition. A region's seconds are its own, forward and backward, in
    all layers, without those of regions inside of it; with recomputation the second forward pass is in them. Of
    several ranks each figure is that of the rank which took longest for it.
    """
    seconds: dict[str, list[float]] = {}
    clock = Clock(device)
    with step.named(clock):
        for number in range(warmup + repeats):
            if control is not None:
                dist.barrier(control)
            step(clock)
            own = clock.take()
            if number >= warmup:
                for name, value in sums(own).items():
                    seconds.setdefault(name, []).append(value)
    return {name: spread(largest(values, control)) for name, values in seconds.items()}


def sums(own: dict[tuple[str, ...], float]) -> dict[str, float]:
    """`Clock.take` -> seconds by name, as `time_breakdown` describes them; parts and regions that never ran are 0."""
    out = dict.fromkeys(("step", *STEP_PARTS, EXCHANGE, *REGIONS), 0.0)
    for path, value in own.items():
        out["step"] += value
        out[path[0]] += value
        if len(path) > 1:
            out[path[-1]] += value
            if path[-1] in _EXCHANGING:
                out[EXCHANGE] += value
    return out
