"""AdamW over named parameters, with its state laid out for checkpoints.

The arithmetic is a fused kernel, torch's (`torch_adamw`) or apex's; only the bookkeeping is ours: state exists from
the start under stable names, so a checkpoint fills it in place. Sharded parameters have sharded state, and every rank
updates its own part.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_nucleus.core.optimizer import shards
from megatron_nucleus.ops.registry import missing
from megatron_nucleus.utils.errors import ConfigError

# Optional kernels: module of an adapter with ``adamw`` (`torch_adamw`) and ``why_unavailable(device_type)``.
ADAMW_BACKENDS = {"apex": "megatron_nucleus.backends.apex"}


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
        backend: ``torch``, or one of `ADAMW_BACKENDS`.

    Raises:
        ConfigError: the backend cannot update these parameters here; the message says why.
    """

    def __init__(
        self, params: list[AdamWParam], *, beta1: float, beta2: float, eps: float, backend: str = "torch"
    ):
        self.params = params
        self._update = torch_adamw if backend == "torch" else _resolve(backend, params)
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
            self._update(
                shards.local(params),
                shards.local(p.grad for p in params),
                shards.local(self.exp_avg[i] for i in members),
                shards.local(self.exp_avg_sq[i] for i in members),
                steps=self.steps,
                lr=lr * lr_factor,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=weight_decay,
            )
        self.steps += 1


def torch_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place by torch's fused kernel. steps: taken before."""
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), float(steps), device=p.device) for p in params],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Why one of `ADAMW_BACKENDS` cannot run on ``device_type``, in one line; None when it can."""
    try:
        module = importlib.import_module(ADAMW_BACKENDS[backend])
    except Exception as error:  # optional libraries raise more than ImportError at import
        return missing(error)
    return module.why_unavailable(device_type)


@torch.no_grad()
def _resolve(backend: str, params: list[AdamWParam]) -> Callable:
    """Its function. Parameters may be on the meta device still: then they are taken to go to the GPU."""
    types = {p.param.device.type for p in params} - {"meta"}
    reason = next(
        (r for r in (why_unavailable(backend, t) for t in types or {"cuda"}) if r is not None), None
    )
    if reason is None:
        wide = next((p for p in params if p.param.dtype != torch.float32), None)
        reason = wide and f"takes float32 parameters, '{wide.name}' is {wide.param.dtype}"
    if reason is None:
        bent = next((p for p in params if not shards.local([p.param])[0].is_contiguous()), None)
        reason = bent and f"takes contiguous parameters, '{bent.name}' is not"
    if reason is not None:
        raise ConfigError(f"--adamw-backend {backend}: {reason}. Usable here: torch.")
    return importlib.import_module(ADAMW_BACKENDS[backend]).adamw
