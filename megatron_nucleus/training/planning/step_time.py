"""How long a training step takes on a named GPU and network: a roofline, and which exchange hides behind what.

Products run at a stated share of the matmul peak or at the memory's rate, whichever takes longer; everything else at
the memory's rate. Exchanges run beside the work as the code lets them: the tokens' way to the experts behind the shared
expert, pieces of a micro-batch behind the experts' work on other pieces, FSDP's next weights and last gradients behind
a block. A link carries one exchange after another. Left out: data, the host's own time, ranks that wait for slower
ones, what an exchange's kernels take from the work beside them. A forecast for choosing between settings, not a
measurement.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_nucleus.core.optimizer.param_groups import NO_SPLIT
from megatron_nucleus.training.planning.devices import Gpu, Links
from megatron_nucleus.training.planning.ledger import Ledger, Op
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.parameters import ROOT, MuonWork, parameters
from megatron_nucleus.training.planning.traffic import FsdpGroup, exchange_bytes, fsdp_groups

# Passes over fp32 values in an update. Muon: momentum (read twice with the gradient, written), decay (read, written),
# direction (momentum and gradient read, half a value written), update (read with half a value, written). AdamW: weight
# and both moments read and written, gradient read. Clipping: gradients read, read and written.
MUON_PASSES, ADAMW_PASSES, CLIP_PASSES = 10.0, 7.0, 3.0


class Rates(NamedTuple):
    """What a GPU reaches. matmul, attention: FLOP/s; memory: bytes/s; optimizer: FLOP/s of Newton-Schulz.

    matmul8: FLOP/s of 8-bit operands; 0 where nothing is multiplied so.
    """

    matmul: float
    attention: float
    memory: float
    optimizer: float
    matmul8: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step. The first five are work; the exposed ones are waits that nothing hides.

    exchange_s: all exchanges, hidden or not.
    """

    forward_s: float
    backward_s: float
    recompute_s: float
    muon_s: float
    other_optimizer_s: float
    exposed_all_to_all_s: float
    exposed_fsdp_s: float
    exposed_optimizer_s: float
    all_to_all_s: float
    fsdp_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        work = self.forward_s + self.backward_s + self.recompute_s + self.muon_s + self.other_optimizer_s
        return work + self.exposed_all_to_all_s + self.exposed_fsdp_s + self.exposed_optimizer_s


def rates(
    gpu: Gpu,
    peak_flops: float,
    matmul_frac: float,
    attention_frac: float,
    memory_frac: float,
    fp8: bool = False,
) -> Rates:
    """Achieved rates from peaks and shares. fp8: whether 8-bit products are formed.

    Raises:
        ConfigError: they are, and the GPU has none.
    """
    matmul = peak_flops * matmul_frac
    matmul8 = gpu.peak_fp8_flops() * matmul_frac if fp8 else 0.0
    memory = gpu.memory_bytes_per_s * memory_frac
    return Rates(matmul, peak_flops * attention_frac, memory, matmul, matmul8)


def moe_span_s(exchange_s: float, shared_s: float, experts_s: float, chunks: int, overlap: bool) -> float:
    """From the first token's departure to the last row's return, in the forward pass.

    The link takes the pieces' exchanges one after another, those there before those back; the GPU takes the shared
    expert and then the experts' work on each piece that has arrived (`AllToAllDispatcher`).
    """
    piece_s, work_s = exchange_s / chunks, experts_s / chunks
    arrivals = [piece_s * (i + 1) for i in range(chunks)]
    link_s = arrivals[-1]
    gpu_s = shared_s if overlap else link_s + shared_s
    for arrival in arrivals:
        gpu_s = max(gpu_s, arrival) + work_s
        link_s = max(link_s, gpu_s) + piece_s
    return max(gpu_s, link_s)


def moe_grad_span_s(exchange_s: float, shared_s: float, experts_s: float, chunks: int) -> float:
    """The same for gradients. Autograd runs the last operation first: rows' gradients leave and are waited for, the
    experts', then the shared expert's work hides the gradients' way home."""
    piece_s, work_s = exchange_s / chunks, experts_s / chunks
    link_s, gpu_s = exchange_s, 0.0
    for i in range(chunks):
        gpu_s = max(gpu_s, piece_s * (i + 1)) + work_s
        link_s = max(link_s, gpu_s) + piece_s
    return max(gpu_s + shared_s, link_s)


def forecast(work: Work, speed: Rates, links: Links) -> StepTime:
    """Time of one step of every rank; all ranks do the same amount of work."""
    return _Forecast(work, speed, links).total()


class _Forecast:
    def __init__(self, work: Work, speed: Rates, links: Links):
        self.work, self.speed, self.links = work, speed, links
        self.blocks = work.blocks()
        self.groups: dict[int, list[FsdpGroup]] = {}
        for group in fsdp_groups(work):
            self.groups.setdefault(group.layer, []).append(group)
        # Token and weight exchanges share a link where both leave the node, or neither does.
        self.one_link = links.crosses(work.layout, "ep") == links.crosses(work.layout, "shard")

    def total(self) -> StepTime:
        """All micro-batches and the update."""
        work = self.work
        alike: dict[int, tuple[float, ...]] = {}  # blocks that are alike share a ledger
        ends = [work.stem(), work.head()]
        forward = sum(self._seconds(part) for part in ends)
        backward = sum(self._seconds(part, backward=True) for part in ends)
        recompute = exposed_tokens = exposed_weights = tokens_s = weights_s = 0.0
        root = self._gather_s(ROOT) + self._gather_s(0)  # nothing runs before the first weights are there
        exposed_weights += root
        for i, block in enumerate(self.blocks):
            one_way = self.links.all_to_all_s(work.layout, exchange_bytes(work, i))
            if id(block) not in alike:
                times = [self._seconds(block), self._seconds(block, backward=True), self._again_s(block)]
                alike[id(block)] = (*times, *self._spans(block, one_way))
            compute, compute_back, again, span, span_back = alike[id(block)]
            ahead = self._gather_s(i + 1) if i + 1 < len(self.blocks) else 0.0
            behind = self._reduce_s(i) + (self._gather_s(i - 1) if i and work.reshard else 0.0)
            exposed_weights += self._waits(compute + span, 2 * one_way, ahead)
            exposed_weights += self._waits(compute_back + again + span_back, 2 * one_way, behind)
            exposed_tokens += span + span_back
            tokens_s += 4 * one_way
            weights_s += ahead + behind
            forward, backward, recompute = forward + compute, backward + compute_back, recompute + again
        n = work.accumulation
        copies = sum(self._copies_s(i) for i in self.groups)
        last = (
            self._reduce_s(ROOT) + copies
        )  # the rest of the model's gradients come last, with nothing beside them
        muon_s, other_s, exchange_s = self._optimizer()
        return StepTime(
            n * forward, n * backward, n * recompute, muon_s, other_s,
            n * exposed_tokens, n * exposed_weights + last, max(0.0, exchange_s - muon_s - other_s),
            n * tokens_s, n * (weights_s + root) + last,
        )  # fmt: skip

    def _spans(self, block: Ledger, one_way: float) -> tuple[float, float]:
        """What the exchanges add to forward and backward work."""
        if not one_way:
            return 0.0, 0.0
        work = self.work
        parts = [[self._part(block, p, back) for p in ("shared_", "expert_")] for back in (False, True)]
        there = moe_span_s(one_way, *parts[0], work.chunks, work.shared_overlap) - sum(parts[0])
        return there, moe_grad_span_s(one_way, *parts[1], work.chunks) - sum(parts[1])

    def _waits(self, busy_s: float, tokens_s: float, weights_s: float) -> float:
        """How much longer the links are busy than the rest."""
        link_s = tokens_s + weights_s if self.one_link else max(tokens_s, weights_s)
        return max(0.0, link_s - busy_s)

    def _gather_s(self, layer: int) -> float:
        layout = self.work.layout
        return sum(self.links.gather_s(layout, g.axis, g.weight_bytes) for g in self.groups[layer])

    def _reduce_s(self, layer: int) -> float:
        layout = self.work.layout
        return sum(self.links.gather_s(layout, g.axis, g.gradient_bytes) for g in self.groups[layer])

    def _copies_s(self, layer: int) -> float:
        """All-reduce of a group's shards between copies: a reduce-scatter and an all-gather."""
        layout, out = self.work.layout, 0.0
        for g in self.groups[layer]:
            shard_bytes = g.gradient_bytes / getattr(layout, g.axis)
            out += 2 * self.links.gather_s(layout, g.copies_axis, shard_bytes)
        return out

    def _again_s(self, block: Ledger) -> float:
        """Recomputation of a block."""
        kinds = {"none": (), "selective": ("cheap",), "full": ("cheap", "costly", "passing")}[
            self.work.recompute
        ]
        return sum(self._op_s(block, op) for op in block.ops if op.result in kinds)

    def _seconds(self, part: Ledger, backward: bool = False) -> float:
        return sum(self._op_s(part, op, backward) for op in part.ops)

    def _part(self, block: Ledger, prefix: str, backward: bool) -> float:
        names = [op for op in block.ops if op.name.startswith(prefix) and op.name != "expert_choice"]
        return sum(self._op_s(block, op, backward) for op in names)

    def _op_s(self, part: Ledger, op: Op, backward: bool = False) -> float:
        """Of an operation that is no exchange."""
        if op.kind == "exchange":
            return 0.0
        names = (*op.reads, *op.writes, *(op.saves if backward else op.inner))
        moved = sum(part.bytes[n] for n in names) + op.weight_values * part.numerics.bytes
        rate = {"attention": self.speed.attention, "matmul8": self.speed.matmul8}.get(
            op.kind, self.speed.matmul
        )
        flops = op.grad_flops if backward else op.flops
        casts = op.grad_cast_bytes if backward else op.cast_bytes
        return max(flops / rate, moved / self.speed.memory) + casts / self.speed.memory

    def _optimizer(self) -> tuple[float, float, float]:
        """(Muon, AdamW and clipping, exchanges of Muon)."""
        work = self.work
        muon: MuonWork = work.muon()
        everything = [p for p in parameters(work.shape, work.optimizer) if p.trained]
        stored = sum(p.stored(work.layout) for p in everything)
        adamw = sum(p.stored(work.layout) for p in everything if p.split == NO_SPLIT)
        # Weights and gradients are as many of the values that pass as averages.
        passes = (work.weight_bytes + work.state_bytes) / 2 / self.speed.memory
        muon_s = muon.flops / self.speed.optimizer + MUON_PASSES * muon.values * passes
        other_s = (ADAMW_PASSES * adamw + CLIP_PASSES * stored) * passes
        shard = ("gather", "return")
        exchange_s = sum(self.links.gather_s(work.layout, "shard", muon.sent_bytes[k]) for k in shard)
        exchange_s += self.links.gather_s(work.layout, "replicate", muon.sent_bytes["replicate"])
        return muon_s, other_s, exchange_s
