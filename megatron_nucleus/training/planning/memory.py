"""What a rank's memory holds at the fullest moment of a training step.

A step is walked through as it runs: forward block by block, the losses, backward block by block, the optimizer. At each
place stand the weights and the optimizer's state, what autograd keeps so far, the gradients made so far, and what is
there for a moment alone: weights that FSDP has gathered, recomputed activations, gradients on their way to their
shards, Muon's work space. The fullest place is the peak. Counted are the bytes of tensors; what an allocator rounds
up and what libraries hold beside it is the margin of `plan.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.muon import BATCH_VALUES
from megatron_nucleus.core.optimizer.rounding import PIECE_VALUES
from megatron_nucleus.core.parallel_state import Layout
from megatron_nucleus.training.planning import liveness, operations
from megatron_nucleus.training.planning.ledger import BF16_BYTES, FP32_BYTES, Ledger, MicroBatch, Numerics
from megatron_nucleus.training.planning.parameters import (
    ROOT,
    MuonWork,
    group_values,
    muon_work,
    parameters,
)


class Memory(NamedTuple):
    """Bytes of one rank at one moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Work:
    """One rank's training step, as far as memory, traffic and time follow from it.

    recompute: of `liveness.GRANULARITIES`. reshard: `ParallelConfig.reshard_after_forward`. optimizer, ns_steps: of
    `OptimizerConfig`. muon_bytes: per value of Newton-Schulz's arithmetic. device_type: ``cuda`` or ``cpu``.
    exchange, fp8, fp8_layers: of `ledger.Numerics`. weight_bytes, state_bytes: per value of a parameter and of the
    optimizer's averages.
    """

    shape: ModelShape
    layout: Layout
    batch: MicroBatch
    accumulation: int
    bf16: bool
    recompute: str = "none"
    reshard: bool = True
    plain: frozenset[str] = frozenset()
    chunks: int = 1
    shared_overlap: bool = True
    optimizer: str = "muon"
    ns_steps: int = 5
    muon_bytes: int = BF16_BYTES
    device_type: str = "cuda"
    exchange: str = "alltoall"
    fp8: str = "none"
    fp8_layers: frozenset[str] = frozenset()
    weight_bytes: int = FP32_BYTES
    state_bytes: int = FP32_BYTES

    @property
    def numerics(self) -> Numerics:
        """In what the model computes."""
        ready = self.layout.world > 1 or (self.bf16 and self.weight_bytes == BF16_BYTES)
        fp8 = (self.exchange, self.fp8, self.fp8_layers)
        return Numerics(self.bf16, ready, self.plain, self.layout.ep, self.chunks, *fp8)

    def blocks(self) -> list[Ledger]:
        """The ledger of every block; blocks that are alike share one."""
        return _blocks(self.shape, self.batch, self.numerics)

    def stem(self) -> Ledger:
        """Latents, noise level and text to the first block."""
        return operations.stem(self.shape, self.batch, self.numerics)

    def head(self) -> Ledger:
        """The last block to the loss."""
        return operations.head(self.shape, self.batch, self.numerics)

    def muon(self) -> MuonWork:
        """Muon's share."""
        limit = BATCH_VALUES["cpu" if self.device_type == "cpu" else "cuda"]
        return muon_work(self.shape, self.layout, self.optimizer, self.ns_steps, self.muon_bytes, limit)


@functools.lru_cache(maxsize=64)
def _blocks(shape: ModelShape, batch: MicroBatch, numerics: Numerics) -> list[Ledger]:
    alike: dict[tuple, Ledger] = {}
    out = []
    for layer in range(shape.num_layers):
        kind = (shape.is_moe(layer), shape.capacity_factors[layer] if shape.is_moe(layer) else 0)
        if kind not in alike:
            alike[kind] = operations.block(shape, layer, batch, numerics)
        out.append(alike[kind])
    return out


def moments(work: Work) -> dict[str, Memory]:
    """The fullest moment of each phase: ``forward``, ``backward`` and ``optimizer``."""
    walk = _Walk(work)
    return {
        name: max(places, key=lambda memory: memory.total)
        for name, places in (
            ("forward", walk.forward()),
            ("backward", walk.backward()),
            ("optimizer", [walk.optimizer_step()]),
        )
    }


def peak(work: Work) -> Memory:
    """The fullest moment of a training step."""
    return max(moments(work).values(), key=lambda memory: memory.total)


_NOTHING = liveness.Peak(0, 0)


class _Walk:
    """The step of one rank, place by place."""

    def __init__(self, work: Work):
        self.work, layout = work, work.layout
        self.accumulates = work.accumulation > 1
        everything = parameters(work.shape, work.optimizer)
        each = work.weight_bytes
        self.weights = each * sum(p.stored(layout) for p in everything)
        trained = [p for p in everything if p.trained]
        self.state = sum(p.state_bytes(each, work.state_bytes) * p.stored(layout) for p in trained)
        self.all_grads = each * sum(p.stored(layout) for p in trained)
        self.grads_of: dict[int, int] = {}
        for p in trained:
            self.grads_of[p.layer] = self.grads_of.get(p.layer, 0) + each * p.stored(layout)
        self.stem, self.head, self.blocks = work.stem(), work.head(), work.blocks()
        self.stem_bytes = liveness.size(self.stem, liveness.saved(self.stem))
        stays = {id(b): liveness.kept(b, work.recompute) for b in self.blocks}
        self.kept = [liveness.size(b, stays[id(b)]) for b in self.blocks]
        # Blocks that are alike share a ledger, and all that follows from it.
        grad_bytes, transient = self._grad_bytes()
        self.there, self.again, self.back = {}, {}, {}
        for b in {id(b): b for b in self.blocks}.values():
            self.there[id(b)] = liveness.forward_peak(b, stays[id(b)])
            again = liveness.forward_peak(b, liveness.saved(b), stays[id(b)])
            self.again[id(b)] = again + b.bytes["x_next"]  # and the gradient that waits
            self.back[id(b)] = liveness.backward_peak(b, grad_bytes, transient)
        # Two more of the latents' size: the clean ones and the noise, which the loss needs again (fp32).
        latents = work.batch.images * work.batch.tokens * work.shape.patch_channels
        self.stem_bytes += 2 * FP32_BYTES * latents

    def forward(self) -> list[Memory]:
        """Moments of the last micro-batch's forward pass."""
        kept, casts, places = self.stem_bytes, self._casts(self.stem), []
        for i, block in enumerate(self.blocks):
            casts += self._casts(block)
            places.append(self._at(kept + self.there[id(block)], self._gathered(i, i + 1) + casts))
            kept += self.kept[i]
        return places

    def backward(self) -> list[Memory]:
        """Moments of the last micro-batch's backward pass."""
        work, last = self.work, len(self.blocks) - 1
        grad_bytes, transient = self._grad_bytes()
        kept = self.stem_bytes + sum(self.kept)
        casts = self._casts(self.stem) + self._casts(self.head)
        if work.recompute == "none":
            casts += sum(map(self._casts, self.blocks))
        stage = liveness.backward_peak(self.head, grad_bytes, transient)
        places = [self._at(kept + stage.activations, self._gathered(last, last) + casts, 0, stage)]
        done = self.grads_of[ROOT]
        for i in reversed(range(len(self.blocks))):
            block, ours = self.blocks[i], self._casts(self.blocks[i])
            kept -= self.kept[i]
            held = casts if work.recompute == "none" else casts + ours
            gathered = self._gathered(i, i - 1) + self._flat(i + 1)
            if work.recompute != "none":
                places.append(self._at(kept + self.again[id(block)], gathered + held, done))
            stage = self.back[id(block)]
            places.append(self._at(kept + stage.activations, gathered + held, done, stage))
            if work.layout.world > 1:
                places += self._reductions(i, kept + 2 * block.bytes["x"], done)
            done += self.grads_of[i]
            if work.recompute == "none":
                casts -= ours
        return places

    def optimizer_step(self) -> Memory:
        """Everything persistent and Muon's work space."""
        muon, each = self.work.muon(), self.work.muon_bytes
        stack, gram = muon.batch_values
        space = max(2 * (stack + gram) * each, stack * (each + FP32_BYTES))
        # The line, the inbox and the whole matrices put together from it.
        exchange = (max(1, muon.lines) * muon.line_values + 2 * muon.owned_values) * each
        if BF16_BYTES in (self.work.weight_bytes, self.work.state_bytes):
            # In fp32: gradients, momentum and direction of a batch, and pieces of the rest.
            wide = 3 * FP32_BYTES
            space = max(space, wide * stack, wide * PIECE_VALUES[self.work.device_type])
        return Memory(self.weights, self.all_grads, self.state, 0, space + exchange)

    def _at(self, activations: int, buffers: int, done: int = 0, stage: liveness.Peak = _NOTHING) -> Memory:
        """done: gradients that are finished, where none are left from an earlier micro-batch."""
        gradients = (self.all_grads if self.accumulates else done) + stage.weight_gradients
        return Memory(self.weights, gradients, self.state, activations, buffers)

    def _grad_bytes(self) -> tuple[int, int]:
        """Per trained weight value: of a gradient that stays, of what is freed again at once."""
        work = self.work
        if work.layout.world > 1:
            return (BF16_BYTES if work.bf16 else FP32_BYTES), 0
        stored = work.weight_bytes
        low = BF16_BYTES if work.bf16 and stored != BF16_BYTES else 0
        return (0, stored + low) if self.accumulates else (stored, low)

    def _casts(self, part: Ledger) -> int:
        """bf16 copies that autocast makes of weights that are not gathered in bf16."""
        if not part.numerics.copies_weights:
            return 0
        return BF16_BYTES * sum(op.weight_values for op in part.ops if not op.constant)

    def _gathered(self, present: int, following: int) -> int:
        """Weights that FSDP has gathered: the rest of the model, a block, and the block that is fetched ahead."""
        work = self.work
        if work.layout.world == 1:
            return 0
        each = BF16_BYTES if work.bf16 else FP32_BYTES
        values = group_values(work.shape, work.layout, ROOT, experts=False)
        layers = {present, following} & set(range(work.shape.num_layers))
        if not work.reshard:
            layers = set(range(work.shape.num_layers))
        values += sum(group_values(work.shape, work.layout, i, experts=False) for i in layers)
        experts = {present} if work.reshard else layers
        values += sum(group_values(work.shape, work.layout, i, experts=True) for i in experts)
        return values * each

    def _flat(self, layer: int) -> int:
        """A block's gradients as the last reduction took them; FSDP lets go of them at the next one."""
        work = self.work
        if work.layout.world == 1 or layer >= len(self.blocks):
            return 0
        return FP32_BYTES * group_values(work.shape, work.layout, layer, experts=False, trained=True)

    def _reductions(self, layer: int, activations: int, done: int) -> list[Memory]:
        """A group's gradients as they came, flat in fp32 for the reduction, and the shard that comes out of it."""
        work, each = self.work, BF16_BYTES if self.work.bf16 else FP32_BYTES
        places, waiting = [], 0
        dense = group_values(work.shape, work.layout, layer, experts=False, trained=True)
        experts = group_values(work.shape, work.layout, layer, experts=True, trained=True)
        for values in (experts, dense):
            flat = values * FP32_BYTES
            own = flat // (work.layout.efsdp if values is experts else work.layout.shard)
            own += own // FP32_BYTES * work.weight_bytes if work.weight_bytes < FP32_BYTES else 0
            # First the gradients as they came beside the flat ones, then those alone with the shard (and what gloo
            # reduces, which is a copy).
            copies = 2 if work.device_type == "cpu" else 1
            here = max(values * each + flat, copies * flat + own)
            buffers = self._gathered(layer, layer - 1) + waiting + here
            places.append(self._at(activations, buffers, done))
            waiting = own
        return places
