"""AdamW over named parameters, with its state laid out for checkpoints.

The arithmetic is torch's fused kernel (`torch.optim.adamw.adamw`); only the bookkeeping is ours: state exists
from the start under stable names, so a checkpoint fills it in place. Sharded parameters have sharded state, and
every rank updates its own part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_nucleus.core.optimizer import shards


class AdamWParam(NamedTuple):
    """A parameter under AdamW. lr_factor multiplies the step's learning rate."""

    name: str
    param: nn.Parameter
    lr_factor: float
    weight_decay: float


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101).

    Args:
        params: what to train.
        beta1, beta2: decay of the averages of gradient and squared gradient.
        eps: added to the root of the second average.
    """

    def __init__(self, params: list[AdamWParam], *, beta1: float, beta2: float, eps: float):
        self.params = params
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.exp_avg = [torch.zeros_like(p.param) for p in params]
        self.exp_avg_sq = [torch.zeros_like(p.param) for p in params]
        self.steps = 0
        self._groups: dict[tuple[float, float], list[int]] = {}
        for i, p in enumerate(params):
            self._groups.setdefault((p.lr_factor, p.weight_decay), []).append(i)

    def tensors(self) -> dict[str, Tensor]:
        """State by stable name; filling it in place and setting ``steps`` restores the optimizer."""
        names = [p.name for p in self.params]
        first = {f"adamw.exp_avg.{n}": t for n, t in zip(names, self.exp_avg, strict=True)}
        return first | {f"adamw.exp_avg_sq.{n}": t for n, t in zip(names, self.exp_avg_sq, strict=True)}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient. lr: learning rate before the groups' factors."""
        for (lr_factor, weight_decay), members in self._groups.items():
            params = [self.params[i].param for i in members]
            local_params = shards.local(params)
            adamw(
                local_params,
                shards.local(p.grad for p in params),
                shards.local(self.exp_avg[i] for i in members),
                shards.local(self.exp_avg_sq[i] for i in members),
                [],
                [torch.full((), float(self.steps), device=p.device) for p in local_params],
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=lr * lr_factor,
                weight_decay=weight_decay,
                eps=self.eps,
                maximize=False,
            )
        self.steps += 1
