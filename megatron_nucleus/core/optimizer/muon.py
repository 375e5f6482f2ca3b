"""Muon for many matrices at once: all matrices of one shape, across layers and experts, are one batch.

The update rule is that of `muon_reference.py`; here it runs as batched matmuls without a loop over experts.
The experts are 90 % of the published model's parameters, so this is where an optimizer step spends its time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nucleus.core.optimizer.param_groups import SPLITS

# One step maps every singular value s (the largest is at most 1) to a*s + b*s^3 + c*s^5.
# Five or more steps: Keller Jordan's coefficients; values above 0.003 end in [0.68, 1.21].
# Four and three steps: the minimax quintics of Polar Express (arXiv 2505.16932), computed for values in
# [0.003, 1.02] and [0.01, 1.02] with 1 % between steps for rounding; they end in [0.78, 1.22] and [0.71, 1.29].
JORDAN = (3.4445, -4.7750, 2.0315)
MINIMAX = {
    3: ((7.942388, -22.287293, 15.823857), (3.623094, -2.662054, 0.514067), (2.686905, -1.971038, 0.440643)),
    4: (
        (8.221763, -23.346858, 16.633755),
        (4.012115, -2.930303, 0.543126),
        (3.507991, -2.581028, 0.505327),
        (2.529413, -1.844704, 0.427668),
    ),
}
NORM_FLOOR = 1e-7  # a zero gradient must stay a zero update; the value of torch.optim.Muon

# Values orthogonalised together. On a CPU a batch that stays in the cache beats one long batch. On a GPU the
# bound only keeps the work tensors small beside the model (256 MiB each in bf16).
BATCH_VALUES = {"cpu": 1 << 18, "cuda": 1 << 27}


class MuonParam(NamedTuple):
    """A parameter under Muon. split: key of `SPLITS`. lr_factor multiplies the step's learning rate."""

    name: str
    param: nn.Parameter
    split: str
    lr_factor: float
    weight_decay: float


class _Slot(NamedTuple):
    """Matrices [low, high) of a parameter's leading axis, and where they lie in a batch's stack."""

    index: int
    low: int
    high: int
    start: int
    count: int


class _Batch(NamedTuple):
    """Matrices of one shape, stored with rows <= columns."""

    rows: int
    columns: int
    count: int
    slots: tuple[_Slot, ...]


def coefficients(steps: int) -> tuple[tuple[float, float, float], ...]:
    """Quintic coefficients (a, b, c) of each of ``steps`` Newton-Schulz steps."""
    return MINIMAX.get(steps) or (JORDAN,) * steps


def newton_schulz(stack_nrc: Tensor, steps: int) -> Tensor:
    """Orthogonalise every matrix of a stack.

    Args:
        stack_nrc: [n, r, c] with r <= c (the Gram matrix is r x r), fp32 or bf16; used as work space.
        steps: Newton-Schulz steps, at least 3; see `coefficients`.

    Returns:
        [n, r, c] of the same dtype, singular values about 1; may share memory with the input.
    """
    norm = torch.linalg.vector_norm(stack_nrc, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = stack_nrc.mul_(norm.clamp_(min=NORM_FLOOR).reciprocal_())
    n, r, _ = x.shape
    gram, poly, other = x.new_empty(n, r, r), x.new_empty(n, r, r), torch.empty_like(x)
    for a, b, c in coefficients(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, poly, x, beta=a, out=other)
        x, other = other, x
    return x


class Muon:
    """Muon over a list of parameters.

    Args:
        params: what to train, each with its split into matrices.
        momentum: decay of the gradient average (published 0.95).
        nesterov: look ahead by one momentum step.
        steps: Newton-Schulz steps.
        scale: update RMS is about ``scale`` whatever the shape (0.2 matches AdamW's, arXiv 2502.16982).
        dtype: dtype of the Newton-Schulz arithmetic; None = bf16 on CUDA, fp32 elsewhere.
    """

    def __init__(
        self,
        params: list[MuonParam],
        *,
        momentum: float,
        nesterov: bool,
        steps: int,
        scale: float,
        dtype: torch.dtype | None = None,
    ):
        self.params = params
        self.beta, self.nesterov, self.steps, self.scale = momentum, nesterov, steps, scale
        self.momentum = [torch.zeros_like(p.param) for p in params]
        self.dtype = dtype
        self._batches = _plan(params) if params else ()

    def tensors(self) -> dict[str, Tensor]:
        """State by stable name; filling these tensors in place restores the optimizer."""
        return {f"muon.momentum.{p.name}": m for p, m in zip(self.params, self.momentum, strict=True)}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient. lr: learning rate before the groups' factors."""
        if not self.params:
            return
        grads = [p.param.grad for p in self.params]
        weights = [p.param for p in self.params]
        torch._foreach_lerp_(self.momentum, grads, 1.0 - self.beta)
        for param in self.params:
            if param.weight_decay:
                param.param.mul_(1.0 - lr * param.lr_factor * param.weight_decay)
        for batch in self._batches:
            stack = self._gather(batch, grads)
            self._apply(batch, newton_schulz(stack, self.steps), weights, lr)

    def _views(self, slot: _Slot, tensors: list[Tensor]) -> Tensor:
        """The slot's matrices of a parameter-shaped tensor, turned so that rows <= columns."""
        view = SPLITS[self.params[slot.index].split](tensors[slot.index])[slot.low : slot.high]
        return view.mT if view.shape[-2] > view.shape[-1] else view

    def _gather(self, batch: _Batch, grads: list[Tensor]) -> Tensor:
        like = grads[batch.slots[0].index]
        dtype = self.dtype or (torch.bfloat16 if like.is_cuda else like.dtype)
        stack = torch.empty(batch.count, batch.rows, batch.columns, dtype=dtype, device=like.device)
        for slot in batch.slots:
            direction = self._views(slot, self.momentum)
            if self.nesterov:
                direction = torch.lerp(self._views(slot, grads), direction, self.beta)
            stack[slot.start : slot.start + slot.count].view(direction.shape).copy_(direction)
        return stack

    def _apply(self, batch: _Batch, update: Tensor, weights: list[Tensor], lr: float) -> None:
        scale = self.scale * math.sqrt(batch.columns)  # columns = max(fan_in, fan_out)
        for slot in batch.slots:
            view = self._views(slot, weights)
            part = update[slot.start : slot.start + slot.count].view(view.shape)
            view.add_(part, alpha=-lr * self.params[slot.index].lr_factor * scale)


def _plan(params: list[MuonParam]) -> tuple[_Batch, ...]:
    """Group the matrices of all parameters by shape and device into batches of bounded size."""
    pending: dict[tuple, list[_Slot]] = {}
    filled: dict[tuple, int] = {}
    batches = []

    def flush(key: tuple) -> None:
        if pending.get(key):
            batches.append(_Batch(key[1], key[2], filled[key], tuple(pending[key])))
        pending[key], filled[key] = [], 0

    for index, param in enumerate(params):
        view = SPLITS[param.split](param.param)
        rows, columns = sorted(view.shape[-2:])
        key = (param.param.device, rows, columns)
        lead = view.shape[0]
        per_row = math.prod(view.shape[1:-2])  # matrices per step along the leading axis
        values = BATCH_VALUES["cpu" if param.param.device.type == "cpu" else "cuda"]
        limit = max(per_row, values // (rows * columns))
        low = 0
        while low < lead:
            used = filled.setdefault(key, 0)
            room = (limit - used) // per_row
            if room <= 0:
                flush(key)
                continue
            high = min(lead, low + room)
            count = (high - low) * per_row
            pending.setdefault(key, []).append(_Slot(index, low, high, used, count))
            filled[key] = used + count
            low = high
    for key in list(pending):
        flush(key)
    return tuple(batches)
