"""AdamW over named parameters, with its state laid out for checkpoints.

The arithmetic is a fused kernel, torch's (`torch_adamw`) or apex's; only the bookkeeping is ours: state exists from
the start under stable names, so a checkpoint fills it in place. Sharded parameters have sharded state, and every rank
updates its own part.

A bf16 parameter is updated in one of two ways. Either piece by piece: weight, gradient and averages are copied to
fp32, updated there and rounded stochastically where they are stored in bf16. Or, with ``master``, on an fp32 copy of
its own, of which the parameter is the nearest bf16 value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_nucleus.core.optimizer import shards
from megatron_nucleus.core.optimizer.rounding import Rounding, pieces, wide
from megatron_nucleus.ops.registry import missing
from megatron_nucleus.utils.errors import ConfigError

# Optional kernels: module of an adapter with ``adamw`` (`torch_adamw`) and ``why_unavailable(device_type)``.
ADAMW_BACKENDS = {"apex": "megatron_nucleus.backends.apex"}


class AdamWParam(NamedTuple):
    """A parameter under AdamW. lr_factor multiplies the step's learning rate.

    master: keep an fp32 copy of a bf16 parameter, and its averages in fp32.
    """

    name: str
    param: nn.Parameter
    lr_factor: float
    weight_decay: float
    master: bool = False


class AdamW:
    """AdamW with decoupled weight decay (arXiv 1711.05101).

    Args:
        params: what to train.
        beta1, beta2: decay of the averages of gradient and squared gradient.
        eps: added to the root of the second average.
        backend: ``torch``, or one of `ADAMW_BACKENDS`.
        state_dtype: of both averages; None = the parameter's own, at least fp32.
        rounding: writes bf16 parameters and averages.

    Attributes:
        masters: fp32 copies by the parameters' names.

    Raises:
        ConfigError: the backend cannot update these parameters here; the message says why.
    """

    def __init__(
        self,
        params: list[AdamWParam],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        backend: str = "torch",
        state_dtype: torch.dtype | None = None,
        rounding: Rounding | None = None,
    ):
        self.params = params
        self._update = torch_adamw if backend == "torch" else _resolve(backend, params, state_dtype)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.rounding = rounding or Rounding()
        self.masters = {p.name: p.param.detach().float() for p in params if p.master}
        self.exp_avg, self.exp_avg_sq = (
            [torch.zeros_like(p.param, dtype=_state_dtype(p, state_dtype)) for p in params] for _ in range(2)
        )
        self.steps = 0
        self._groups: dict[tuple[float, float], list[int]] = {}
        self._narrow: list[int] = []  # stored in part in bf16
        for i, p in enumerate(params):
            if not p.master and min(p.param.itemsize, self.exp_avg[i].itemsize) < 4:
                self._narrow.append(i)
            else:
                self._groups.setdefault((p.lr_factor, p.weight_decay), []).append(i)
        self._first = {i: shards.first_value(params[i].param) for i in self._narrow}

    def tensors(self) -> dict[str, Tensor]:
        """State by stable name; filling it in place and setting ``steps`` restores the optimizer."""
        names = [p.name for p in self.params]
        averages = {f"adamw.exp_avg.{n}": t for n, t in zip(names, self.exp_avg, strict=True)}
        averages |= {f"adamw.exp_avg_sq.{n}": t for n, t in zip(names, self.exp_avg_sq, strict=True)}
        return averages | {f"adamw.master.{n}": t for n, t in self.masters.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Take over what was written into parameters since their fp32 copies were made, as by loading weights."""
        for p in self.params:
            if p.master:
                master, weight = shards.local([self.masters[p.name], p.param])
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient. lr: learning rate before the groups' factors."""
        for (lr_factor, weight_decay), members in self._groups.items():
            params = [self.params[i] for i in members]
            weights = shards.local(self.masters.get(p.name, p.param) for p in params)
            self._fused(
                weights,
                [wide(g) for g in shards.local(p.param.grad for p in params)],
                shards.local(self.exp_avg[i] for i in members),
                shards.local(self.exp_avg_sq[i] for i in members),
                lr=lr * lr_factor,
                weight_decay=weight_decay,
            )
        if self.masters:
            stored = shards.local(p.param for p in self.params if p.master)
            torch._foreach_copy_(stored, shards.local(self.masters.values()))
        for i in self._narrow:
            self._update_in_pieces(i, lr)
        self.steps += 1

    def _update_in_pieces(self, index: int, lr: float) -> None:
        """Update a parameter of which something is stored in bf16; memory: four fp32 copies of a piece."""
        p, first = self.params[index], self._first[index]
        stored = shards.local([p.param, self.exp_avg[index], self.exp_avg_sq[index]])
        weight, *averages = (t.view(-1) for t in stored)
        (grad,) = (t.reshape(-1) for t in shards.local([p.param.grad]))
        names = (p.name, f"adamw.exp_avg.{p.name}", f"adamw.exp_avg_sq.{p.name}")
        keys = [self.rounding.key(name) for name in names]
        for piece in pieces(weight):
            targets = [t[piece] for t in (weight, *averages)]
            values = [wide(t) for t in targets]
            self._fused(
                *([t] for t in (values[0], wide(grad[piece]), *values[1:])),
                lr=lr * p.lr_factor,
                weight_decay=p.weight_decay,
            )
            for target, value, key in zip(targets, values, keys, strict=True):
                if target is not value:
                    self.rounding.write(target, value, key, first + piece.start)

    def _fused(self, *tensors: list[Tensor], lr: float, weight_decay: float) -> None:
        """tensors: as of `torch_adamw`."""
        self._update(
            *tensors,
            steps=self.steps,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=weight_decay,
        )


def _state_dtype(param: AdamWParam, asked: torch.dtype | None) -> torch.dtype:
    own = torch.promote_types(param.param.dtype, torch.float32)
    return own if param.master else asked or own


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
def _resolve(backend: str, params: list[AdamWParam], state_dtype: torch.dtype | None) -> Callable:
    """Its function. Parameters may be on the meta device still: then they are taken to go to the GPU."""
    types = {p.param.device.type for p in params} - {"meta"}
    reason = next(
        (r for r in (why_unavailable(backend, t) for t in types or {"cuda"}) if r is not None), None
    )
    if reason is None:
        other = next((p for p in params if p.param.dtype != torch.float32), None)
        reason = other and f"takes float32 parameters, '{other.name}' is {other.param.dtype}"
    if reason is None and state_dtype not in (None, torch.float32):
        reason = f"takes float32 averages, not {state_dtype}"
    if reason is None:
        bent = next((p for p in params if not shards.local([p.param])[0].is_contiguous()), None)
        reason = bent and f"takes contiguous parameters, '{bent.name}' is not"
    if reason is not None:
        raise ConfigError(f"--adamw-backend {backend}: {reason}. Usable here: torch.")
    return importlib.import_module(ADAMW_BACKENDS[backend]).adamw
