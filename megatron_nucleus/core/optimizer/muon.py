"""Muon for many matrices at once: all matrices of one shape, across layers and experts, are one batch.

The update rule is that of `muon_reference.py`; here it runs as batched matmuls without a loop over experts.
The experts are 90 % of the published model's parameters, so this is where an optimizer step spends its time.
On many ranks each holds whole experts and works alone on them. Dense matrices are cut into rows over ranks: they
come together at one owner each (`exchange.py`), and the experts' work hides the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_nucleus.core.optimizer import shards
from megatron_nucleus.core.optimizer.exchange import STAGES, Exchange
from megatron_nucleus.core.optimizer.param_groups import SPLITS, matrices
from megatron_nucleus.core.optimizer.rounding import Rounding, in_memory_order, pieces, wide
from megatron_nucleus.ops.orthogonalize import orthogonalize

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


class _Source(NamedTuple):
    """A tensor of matrices to orthogonalise on this rank; index: its position in the list it is read from."""

    index: int
    split: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Slot(NamedTuple):
    """Matrices [low, high) of a source's leading axis, and where they lie in a batch's stack."""

    index: int
    split: str
    low: int
    high: int
    start: int
    count: int


class _Batch(NamedTuple):
    """Matrices of one shape, stored with rows <= columns."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    count: int
    slots: tuple[_Slot, ...]


def arithmetic(dtype: torch.dtype | None, tensor: Tensor) -> torch.dtype:
    """Dtype of the Newton-Schulz arithmetic for a parameter; dtype: as of `Muon`."""
    return dtype or (torch.bfloat16 if tensor.is_cuda else torch.promote_types(tensor.dtype, torch.float32))


def newton_schulz_flops(shape: Sequence[int], steps: int) -> int:
    """Floating-point operations of `ops.orthogonalize` on matrices [..., rows, columns], every product in full."""
    *lead, a, b = shape
    r, c = min(a, b), max(a, b)
    return math.prod(lead) * steps * (4 * r * r * c + 2 * r * r * r)


class Muon:
    """Muon over a list of parameters.

    Args:
        params: what to train, each with its split into matrices.
        momentum: decay of the gradient average (published 0.95).
        nesterov: look ahead by one momentum step.
        steps: Newton-Schulz steps.
        scale: update RMS is about ``scale`` whatever the shape (0.2 matches AdamW's, arXiv 2502.16982).
        dtype: dtype of the Newton-Schulz arithmetic; None = bf16 on CUDA, the parameter's own elsewhere, at least
            fp32. Between ranks directions and updates travel in it.
        state_dtype: of the momentum; None = the parameter's own, at least fp32.
        orthogonalize: a backend of `ops.orthogonalize`; every stack is handed to it to be overwritten.
        rounding: writes bf16 parameters and momentum; each gets one rounding a step.
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
        state_dtype: torch.dtype | None = None,
        orthogonalize: Callable[[Tensor, int, bool], Tensor] = orthogonalize,
        rounding: Rounding | None = None,
    ):
        self.params = params
        self.beta, self.nesterov, self.steps, self.scale = momentum, nesterov, steps, scale
        self.dtype = dtype
        self.orthogonalize = orthogonalize
        self.rounding = rounding or Rounding()
        self.momentum = [
            torch.zeros_like(p.param, dtype=state_dtype or torch.promote_types(p.param.dtype, torch.float32))
            for p in params
        ]
        self._first = [shards.first_value(p.param) for p in params]
        shapes = [matrices(p.split, p.param.shape) for p in params]
        self._scales = [scale * math.sqrt(max(shape[-2:])) for shape in shapes]  # max(fan_in, fan_out)
        self._cut = [i for i, p in enumerate(params) if shards.is_cut(p.param)]
        whole = [i for i, p in enumerate(params) if not shards.is_cut(p.param)]
        parts = shards.local(p.param for p in params)
        self._batches = _plan([self._source(i, params[i], parts[i].shape) for i in whole])
        self._exchange: Exchange | None = None
        if self._cut:
            costs = [newton_schulz_flops(shapes[i], steps) for i in self._cut]
            cut = [params[i] for i in self._cut]
            self._exchange = Exchange({p.name: p.param for p in cut}, costs, self._arithmetic(cut[0].param))
            owned = [cut[i] for i in self._exchange.owned]
            self._owned_batches = _plan([self._source(k, p, p.param.shape) for k, p in enumerate(owned)])

    def tensors(self) -> dict[str, Tensor]:
        """State by stable name; filling these tensors in place restores the optimizer."""
        return {f"muon.momentum.{p.name}": m for p, m in zip(self.params, self.momentum, strict=True)}

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sends to other ranks per step, by stage: ``gather``, ``return``, ``replicate``."""
        return self._exchange.traffic() if self._exchange else dict.fromkeys(STAGES, 0)

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient. lr: learning rate before the groups' factors."""
        self.start(lr)
        self.finish(lr)

    @torch.no_grad()
    def start(self, lr: float) -> None:
        """Update all but the matrices that are cut. Their updates are on the way then: call `finish` for them."""
        if not self.params:
            return
        weights = shards.local(p.param for p in self.params)
        grads = shards.local(p.param.grad for p in self.params)
        momentum = shards.local(self.momentum)
        self._average(momentum, grads)
        if self._exchange is None:
            self._update(self._batches, weights, grads, momentum, lr)
            return
        half = len(self._batches) // 2  # half of the experts' work hides the way there, half the way back
        self._exchange.gather(self._directions(grads, momentum))
        self._update(self._batches[:half], weights, grads, momentum, lr)
        self._exchange.give_back(self._orthogonalize(self._exchange.assemble()))
        self._update(self._batches[half:], weights, grads, momentum, lr)
        self._exchange.replicate()

    @torch.no_grad()
    def finish(self, lr: float) -> None:
        """Apply the updates that `start` left on their way. lr: as given to `start`."""
        if self._exchange is None:
            return
        weights = shards.local(self.params[i].param for i in self._cut)
        for i, weight, update in zip(self._cut, weights, self._exchange.collect(), strict=True):
            self._apply(i, weight, weight, update, lr)

    def _arithmetic(self, tensor: Tensor) -> torch.dtype:
        return arithmetic(self.dtype, tensor)

    def _source(self, index: int, param: MuonParam, shape: Sequence[int]) -> _Source:
        return _Source(index, param.split, shape, self._arithmetic(param.param), param.param.device)

    def _average(self, momentum: list[Tensor], grads: list[Tensor]) -> None:
        """Move each average towards its gradient, in fp32 at least."""
        weight = 1.0 - self.beta
        if all(m.dtype == g.dtype and m.itemsize >= 4 for m, g in zip(momentum, grads, strict=True)):
            torch._foreach_lerp_(momentum, grads, weight)
            return
        for i, (average, grad) in enumerate(zip(momentum, grads, strict=True)):
            key = self.rounding.key(f"muon.momentum.{self.params[i].name}")
            average, grad = average.view(-1), grad.reshape(-1)
            for piece in pieces(average):
                values = wide(average[piece]).lerp_(wide(grad[piece]), weight)
                if average.itemsize < 4:
                    self.rounding.write(average[piece], values, key, self._first[i] + piece.start)

    def _apply(self, index: int, weight: Tensor, view: Tensor, update: Tensor, lr: float) -> None:
        """Decay ``view``, matrices of this rank's part ``weight`` of a parameter, and add its update.

        A bf16 weight is rounded once for both.
        """
        param = self.params[index]
        rate = lr * param.lr_factor
        values = view
        if view.itemsize < 4:
            values = torch.empty_strided(view.shape, view.stride(), dtype=torch.float32, device=view.device)
            values.copy_(view)
        if param.weight_decay:
            values.mul_(1.0 - rate * param.weight_decay)
        values.add_(update, alpha=-rate * self._scales[index])
        if values is not view:
            first = self._first[index] + view.storage_offset() - weight.storage_offset()
            key = self.rounding.key(param.name)
            self.rounding.write(in_memory_order(view), in_memory_order(values), key, first)

    def _directions(self, grads: list[Tensor], momentum: list[Tensor]) -> list[Tensor]:
        """This rank's rows of what the exchange sends."""
        sent = [self._cut[i] for i in self._exchange.sent]
        momentum = [momentum[i] for i in sent]
        if not (self.nesterov and sent):
            return momentum
        grads = [wide(grads[i]) for i in sent]
        return torch._foreach_lerp(grads, [wide(m) for m in momentum], self.beta)

    def _update(
        self,
        batches: tuple[_Batch, ...],
        weights: list[Tensor],
        grads: list[Tensor],
        momentum: list[Tensor],
        lr: float,
    ) -> None:
        """Orthogonalise and apply matrices that lie whole on this rank."""

        def direction(slot: _Slot) -> Tensor:
            average = wide(_views(slot, momentum))
            return torch.lerp(wide(_views(slot, grads)), average, self.beta) if self.nesterov else average

        for batch in batches:
            update = self.orthogonalize(_stack(batch, direction), self.steps, True)
            for slot in batch.slots:
                view = _views(slot, weights)
                update_view = _part(slot, update).view(view.shape)
                self._apply(slot.index, weights[slot.index], view, update_view, lr)

    def _orthogonalize(self, owned: list[Tensor]) -> list[Tensor]:
        """Orthogonalise the matrices of tensors in place."""
        for batch in self._owned_batches:
            stack = _stack(batch, lambda slot: _views(slot, owned))
            update = self.orthogonalize(stack, self.steps, True)
            for slot in batch.slots:
                view = _views(slot, owned)
                view.copy_(_part(slot, update).view(view.shape))
        return owned


def _views(slot: _Slot, tensors: list[Tensor]) -> Tensor:
    """The slot's matrices of its tensor, turned so that rows <= columns."""
    view = SPLITS[slot.split](tensors[slot.index])[slot.low : slot.high]
    return view.mT if view.shape[-2] > view.shape[-1] else view


def _part(slot: _Slot, stack: Tensor) -> Tensor:
    return stack[slot.start : slot.start + slot.count]


def _stack(batch: _Batch, read: Callable[[_Slot], Tensor]) -> Tensor:
    """Copy the slots' matrices, as ``read`` gives them, behind each other."""
    stack = torch.empty(batch.count, batch.rows, batch.columns, dtype=batch.dtype, device=batch.device)
    for slot in batch.slots:
        matrices = read(slot)
        _part(slot, stack).view(matrices.shape).copy_(matrices)
    return stack


def _plan(sources: list[_Source]) -> tuple[_Batch, ...]:
    """Group the matrices of all sources by shape, dtype and device into batches of bounded size."""
    pending: dict[tuple, list[_Slot]] = {}
    filled: dict[tuple, int] = {}
    batches = []

    def flush(key: tuple) -> None:
        if pending.get(key):
            batches.append(_Batch(*key, filled[key], tuple(pending[key])))
        pending[key], filled[key] = [], 0

    for source in sources:
        lead, *inner, a, b = matrices(source.split, source.shape)
        rows, columns = min(a, b), max(a, b)
        key = (source.device, source.dtype, rows, columns)
        per_row = math.prod(inner)  # matrices per step along the leading axis
        values = BATCH_VALUES["cpu" if source.device.type == "cpu" else "cuda"]
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
            pending.setdefault(key, []).append(_Slot(source.index, source.split, low, high, used, count))
            filled[key] = used + count
            low = high
    for key in list(pending):
        flush(key)
    return tuple(batches)
