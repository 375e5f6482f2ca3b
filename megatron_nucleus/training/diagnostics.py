"""Figures of the training steps beside their losses: by noise level, of the routers, of what was drawn.

They gather on the device and are read at the log interval, never in between.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.stats import RoutingMeter, RoutingReport
from megatron_nucleus.data.loader import Loader
from megatron_nucleus.training.metrics import MetricsWriter
from megatron_nucleus.training.sigma_curve import SigmaCurve
from megatron_nucleus.types import Routing


class Diagnostics:
    """One per rank; all ranks call `row` and `drawn` together.

    Args:
        routing_interval: steps between two looks at the routings; 0 = never.
        control: gloo group of all ranks, None for one process.
    """

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        routing_interval: int,
        control: dist.ProcessGroup | None,
    ):
        self.control, self.interval = control, routing_interval
        self.curve = SigmaCurve(device=device)
        layers = tuple(i for i in range(shape.num_layers) if shape.is_moe(i))
        self.routing = (
            RoutingMeter(layers, shape.num_experts, device) if layers and routing_interval else None
        )
        self._looks = self._pending = False
        self._report: RoutingReport | None = None

    def begin_step(self, step: int) -> None:
        """Say which step (from 1) comes next: whether its routings are looked at."""
        self._looks = self.routing is not None and step % self.interval == 0
        self._pending = self._pending or self._looks

    @torch.no_grad()
    def observe(
        self, losses_B: Tensor, sigma_B: Tensor, routings: list[Routing], grid: tuple[int, int]
    ) -> None:
        """Take in one micro-batch (`step.Observe`)."""
        self.curve.add(losses_B, sigma_B)
        if self._looks:
            self.routing.add(routings, sigma_B, grid)

    def row(self) -> dict:
        """Entries of a metrics row: means over all ranks since the last call. One or two small all-reduces."""
        out = {"flow_loss_by_sigma": self.curve.report(self._sum(self.curve.sums()))}
        self.curve.reset()
        self._report = None
        if self._pending:
            self._pending = False
            self._report = self.routing.report(self._sum(self.routing.sums()))
            self.routing.reset()
            out["routing"] = self._report.scalars()
        return out

    def drawn(self, loader: Loader) -> dict:
        """Entries of a metrics row about what was drawn, over all ranks. One all-reduce of 8 bytes a count.

        ``substituted``: unreadable samples replaced since this start of the program. ``mixture``: see
        `Loader.take_mixture`, the captions of all ranks.
        """
        mixture = loader.take_mixture()
        counts = {"substituted": loader.substituted, **mixture["captions"]}
        total = self._sum(torch.tensor(list(counts.values()), dtype=torch.int64)).tolist()
        counts = dict(zip(counts, total, strict=True))
        return {"substituted": counts.pop("substituted"), "mixture": {**mixture, "captions": counts}}

    def histograms(self, writer: MetricsWriter, step: int) -> None:
        """TensorBoard histograms of the routings that the last `row` told of, one per layer.

        experts_per_token: tokens by how many experts took them. expert_mass: experts by their share of the routing
        weight, in units of 1/E.
        """
        if self._report is None:
            return
        for layer in self._report.layers:
            tag = f"routing/layer_{layer.layer:02d}"
            picked = [share * self._report.tokens for share in layer.experts_per_token_shares]
            writer.histogram(f"{tag}/experts_per_token", picked, np.arange(len(picked) + 1) - 0.5, step)
            mass = [m * len(layer.expert_mass) for m in layer.expert_mass if m is not None]
            writer.histogram(f"{tag}/expert_mass", *np.histogram(mass, bins=20), step)

    def _sum(self, values: Tensor) -> Tensor:
        values = values.cpu()
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values
