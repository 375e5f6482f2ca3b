"""A whole training step as it runs in training, and where its time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_nucleus.core import flow
from megatron_nucleus.core.collectives import gather_rows
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.optimizer import Optimizer
from megatron_nucleus.training.benchmark.parts import Spread, Timed, Workload, spread
from megatron_nucleus.training.benchmark.roofline import synchronize
from megatron_nucleus.training.profiling.clock import Clock
from megatron_nucleus.training.profiling.regions import REGIONS, STEP_PARTS, Sink, named_regions, region
from megatron_nucleus.utils.upload import upload

# Sent to and fro: `dispatch` and `combine` together, forward and backward.
EXCHANGE = "dispatch_combine"
_EXCHANGING = ("dispatch", "combine")
# Of the whole step: what is in none of `STEP_PARTS`, such as dropping the old gradients.
OTHER = "other"


class Step:
    """One optimizer step on random inputs: ``accumulation`` times data, forward and backward, then the optimizer.

    Gradients of the first micro-batch are fresh, those of the others are added, as in training.

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
            self.timed.forward_backward(number == 0, number == accumulation - 1, sink)
        if self.optimizer is not None:
            # Clipping belongs to it, as in the timed parts.
            with region(sink, "optimizer"):
                clip_gradients(
                    self.optimizer.params.values(), self.clip_grad, self.group, self.optimizer.clip_ops
                )
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
        return [upload(t, device) for t in (*host, noise_BSP, sigma_B)]

    return data


def time_breakdown(
    step: Step, repeats: int, warmup: int, device: torch.device, control: dist.ProcessGroup | None
) -> dict[str, Spread]:
    """Seconds of ``step`` from its first line to its last, of its `STEP_PARTS` and `OTHER`, and of what is inside of
    these, `REGIONS` and `EXCHANGE`.

    In every repetition parts and `OTHER` add up to the step; their medians need not. A region's seconds are its own,
    forward and backward, in all layers, without those of regions inside of it; with recomputation the second forward
    pass is in them. Rows that travel beside other work are in dispatch and combine as far as that work waits for them.
    Of several ranks all figures of a repetition are those of the rank whose step took longest.
    """
    rows: list[dict[str, float]] = []
    clock = Clock(device)
    with step.named(clock):
        for number in range(warmup + repeats):
            synchronize(device)
            if control is not None:
                dist.barrier(control)
            with region(clock, "step"):
                step(clock)
            own = clock.take()
            if number >= warmup:
                rows.append(sums(own))
    seconds = of_slowest(rows, control)
    return {name: spread(values) for name, values in seconds.items()}


def of_slowest(rows: list[dict[str, float]], control: dist.ProcessGroup | None) -> dict[str, list[float]]:
    """`sums` of each repetition on this rank -> seconds by name, each repetition's of the slowest rank."""
    names = list(rows[0])
    mine = torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)
    ranks_RNM = gather_rows(mine.flatten(), control).view(-1, *mine.shape)
    slowest_N = ranks_RNM[:, :, names.index("step")].argmax(0)
    chosen_NM = ranks_RNM[slowest_N, torch.arange(len(rows))]
    return {name: chosen_NM[:, i].tolist() for i, name in enumerate(names)}


def sums(own: dict[tuple[str, ...], float]) -> dict[str, float]:
    """`Clock.take` of one ``step`` -> seconds by name, as `time_breakdown` describes them; what never ran is 0."""
    out = dict.fromkeys(("step", *STEP_PARTS, OTHER, EXCHANGE, *REGIONS), 0.0)
    for (_, *inside), value in own.items():
        out["step"] += value
        out[inside[0] if inside else OTHER] += value
        if len(inside) > 1:
            out[inside[-1]] += value
            if inside[-1] in _EXCHANGING:
                out[EXCHANGE] += value
    return out
