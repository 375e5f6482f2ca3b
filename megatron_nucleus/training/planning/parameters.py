"""Which rank holds what of the parameters, from the architecture and the grid of ranks alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.exchange import assign_owners
from megatron_nucleus.core.optimizer.muon import newton_schulz_flops
from megatron_nucleus.core.optimizer.param_groups import FP32_GROUPS, NO_SPLIT, matrices, rule_of
from megatron_nucleus.core.parallel_state import Layout
from megatron_nucleus.export.hf_keys import keys
from megatron_nucleus.training.planning.ledger import FP32_BYTES

FROZEN = "text_q_norm"  # kept for released checkpoints, trained by nobody (`core/transformer/attention.py`)
ROOT = -1


class Parameter(NamedTuple):
    """One parameter. layer: its block, `ROOT` outside of the blocks. split: of `param_groups`, "-" under AdamW.

    group: of `param_groups.GROUPS`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int
    is_expert: bool
    trained: bool
    split: str
    group: str

    @property
    def values(self) -> int:
        """In the whole parameter."""
        return math.prod(self.shape)

    def stored(self, layout: Layout) -> int:
        """Values that the fullest rank stores, FSDP's padding included."""
        if layout.world == 1:
            return self.values
        ranks = layout.ep * layout.efsdp if self.is_expert else layout.shard
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])

    def state_bytes(self, weight_bytes: int, average_bytes: int) -> int:
        """What the optimizer holds per value: Muon's momentum, or AdamW's two averages.

        A small parameter that is stored in 16 bits has an fp32 copy there, and averages in fp32.
        """
        if not self.trained:
            return 0
        if self.split != NO_SPLIT:
            return average_bytes
        if weight_bytes < FP32_BYTES and self.group in FP32_GROUPS:
            return 3 * FP32_BYTES
        return 2 * average_bytes

    def gathered(self, layout: Layout) -> int:
        """Values of this parameter that a rank computes with, once FSDP has gathered them."""
        return self.stored(layout) * (layout.efsdp if self.is_expert else layout.shard)


@functools.cache
def parameters(shape: ModelShape, optimizer: str) -> tuple[Parameter, ...]:
    """All parameters. optimizer: ``muon`` or ``adamw``, as `OptimizerConfig.optimizer`."""
    out = []
    for key in keys(shape):
        head, _, rest = key.native.partition(".")
        layer = int(rest.split(".")[0]) if head == "blocks" else ROOT
        rule = rule_of(key.native)
        split = rule.split if optimizer == "muon" else NO_SPLIT
        is_expert = ".moe.experts." in key.native
        trained = FROZEN not in key.native
        out.append(Parameter(key.native, tuple(key.shape), layer, is_expert, trained, split, rule.group))
    return tuple(out)


@functools.cache
def group_values(
    shape: ModelShape, layout: Layout, layer: int, *, experts: bool, trained: bool = False
) -> int:
    """Gathered values of one FSDP group: a block without its experts, its experts, or the rest of the model."""
    group = [p for p in parameters(shape, "muon") if p.layer == layer and p.is_expert == experts]
    return sum(p.gathered(layout) for p in group if p.trained or not trained)


class MuonWork(NamedTuple):
    """Muon's share of one rank, of the rank that has most of each.

    flops: Newton-Schulz. line_values: this rank's rows of what is exchanged. lines: copies of a line that `replicate`
    gathers. owned_values: matrices that come together here. sent_bytes: by stage, as `Exchange.traffic`.
    batch_values: (stack, gram) values of the largest batch. values: of all weights that this rank updates.
    """

    flops: int
    line_values: int
    lines: int
    owned_values: int
    sent_bytes: dict[str, int]
    batch_values: tuple[int, int]
    values: int


@functools.cache
def muon_work(
    shape: ModelShape, layout: Layout, optimizer: str, steps: int, dtype_bytes: int, batch_limit: int
) -> MuonWork:
    """What one step of Muon takes, by the rules of `core/optimizer/muon.py` and `exchange.py`.

    Args:
        optimizer: as of `parameters`. steps: Newton-Schulz steps. dtype_bytes: of its arithmetic.
        batch_limit: `muon.BATCH_VALUES` of the device.
    """
    muon = [p for p in parameters(shape, optimizer) if p.trained and p.split != NO_SPLIT]
    cut = [p for p in muon if layout.world > 1 and not p.is_expert and layout.shard * layout.replicate > 1]
    whole = [p for p in muon if p not in cut]
    part = layout.ep * layout.efsdp if layout.world > 1 else 1

    def local(p: Parameter) -> tuple[int, ...]:
        return (p.shape[0] // part, *p.shape[1:]) if p.is_expert else p.shape

    flops = sum(newton_schulz_flops(matrices(p.split, local(p)), steps) for p in whole)
    batches = _largest_batch([matrices(p.split, local(p)) for p in whole], batch_limit)
    values = sum(math.prod(local(p)) for p in whole)
    if not cut:
        return MuonWork(flops, 0, 0, 0, dict.fromkeys(("gather", "return", "replicate"), 0), batches, values)
    costs = [newton_schulz_flops(matrices(p.split, p.shape), steps) for p in cut]
    owners = assign_owners(costs, layout.replicate * layout.shard)
    loads = [0] * (layout.replicate * layout.shard)
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += cost
    line, owned, sent = _exchange(cut, owners, layout, dtype_bytes)
    batches = max(batches, _largest_batch([matrices(p.split, p.shape) for p in cut[:1]], batch_limit))
    values += sum(p.stored(layout) for p in cut)
    return MuonWork(flops + max(loads), line, layout.replicate, owned, sent, batches, values)


def _largest_batch(shapes: list, limit: int) -> tuple[int, int]:
    """(values of the matrices, values of their Gram matrices) of the largest batch that `muon._plan` makes."""
    totals: dict[tuple[int, int], list[int]] = {}
    for *lead, a, b in shapes:
        total = totals.setdefault((min(a, b), max(a, b)), [0, 1])
        total[0] += math.prod(lead)
        total[1] = max(total[1], math.prod(lead[1:]))  # what one step along the leading axis adds
    best = (0, 0)
    for (rows, columns), (count, per_row) in totals.items():
        room = max(per_row, limit // (rows * columns) // per_row * per_row)
        together = min(count, room)
        best = max(best, (together * rows * columns, together * rows * rows))
    return best


def _exchange(
    cut: list[Parameter], owners: list[int], layout: Layout, dtype_bytes: int
) -> tuple[int, int, dict[str, int]]:
    """(values of a line, values that an owner brings together, bytes by stage), each of the rank with most."""
    blocks = layout.shard
    counts: dict[tuple[int, ...], torch.Tensor] = {}
    for p in cut:
        if p.shape not in counts:
            size = -(-p.shape[0] // blocks)
            rows = (p.shape[0] - size * torch.arange(blocks)).clamp(0, size)
            counts[p.shape] = rows * math.prod(p.shape[1:])
    lines = torch.zeros(layout.replicate, blocks, dtype=torch.int64)  # [replica, block]: values of its line
    own = torch.zeros(layout.replicate, blocks, dtype=torch.int64)  # of its line, what it owns itself
    owned = torch.zeros(layout.replicate, blocks, dtype=torch.int64)
    for p, owner in zip(cut, owners, strict=True):
        r, b = divmod(owner, blocks)
        lines[r] += counts[p.shape]
        own[r, b] += counts[p.shape][b]
        owned[r, b] += p.values
    sent = {
        "gather": int((lines - own).max()) * dtype_bytes,
        "return": int((owned - own).max()) * dtype_bytes,
        "replicate": (layout.replicate - 1) * int(lines.amax(0).max()) * dtype_bytes,
    }
    return int(lines.max()), int(owned.max()), sent
