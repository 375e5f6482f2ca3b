"""Bytes that a rank moves to other ranks in a training step."""

from __future__ import annotations

from typing import NamedTuple

from megatron_nucleus.core.moe.router import capacity
from megatron_nucleus.training.planning.ledger import BF16_BYTES, FP32_BYTES
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.training.planning.parameters import ROOT, group_values


class FsdpGroup(NamedTuple):
    """One unit of FSDP: its gathered bytes in a forward pass, and those of its gradients in fp32.

    axis, copies_axis: of `Layout`, over which it is sharded and copied.
    """

    layer: int
    axis: str
    copies_axis: str
    weight_bytes: int
    gradient_bytes: int
    gathered_again: bool


def fsdp_groups(work: Work) -> list[FsdpGroup]:
    """The units in forward order: the rest of the model, then each block and its experts."""
    each = BF16_BYTES if work.bf16 else FP32_BYTES
    out = []
    for layer in (ROOT, *range(work.shape.num_layers)):
        kinds = [False]
        if layer != ROOT and work.shape.is_moe(layer):
            kinds.append(True)
        for experts in kinds:
            axes = ("efsdp", "expert_replicate") if experts else ("shard", "replicate")
            weights = group_values(work.shape, work.layout, layer, experts=experts)
            trained = group_values(work.shape, work.layout, layer, experts=experts, trained=True)
            again = work.reshard and layer != ROOT
            out.append(FsdpGroup(layer, *axes, weights * each, trained * FP32_BYTES, again))
    return out


def fsdp_bytes(work: Work) -> dict[str, int]:
    """Sent by a rank in a step: ``all_gather``, ``reduce_scatter`` and, between copies, ``all_reduce``.

    A ring's share: (n-1)/n of the gathered bytes over n ranks, and twice that of what is reduced between copies.
    Weights are gathered for every forward pass and, where `reshard_after_forward` has freed them, for every backward
    pass; gradients are reduced after every backward pass, between copies only after a step's last.
    """
    out = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for group in fsdp_groups(work):
        n, copies = getattr(work.layout, group.axis), getattr(work.layout, group.copies_axis)
        gathers = work.accumulation * (2 if group.gathered_again else 1)
        out["all_gather"] += gathers * group.weight_bytes * (n - 1) // n
        out["reduce_scatter"] += work.accumulation * group.gradient_bytes * (n - 1) // n
        out["all_reduce"] += 2 * (group.gradient_bytes // n) * (copies - 1) // copies
    return out


def exchange_bytes(work: Work, layer: int) -> int:
    """One all-to-all of a layer and micro-batch: the rows of all experts, this rank's own included."""
    if work.layout.ep == 1 or not work.shape.is_moe(layer):
        return 0
    B, S, _ = work.batch
    E = work.shape.num_experts
    rows = E * B * capacity(work.shape.capacity_factors[layer], S, E)
    return rows * work.shape.width * (BF16_BYTES if work.bf16 else FP32_BYTES)


def all_to_all_bytes(work: Work) -> int:
    """Handed by a rank to the all-to-alls of a step: there and back, for values and for gradients.

    Counted as `collectives.Traffic` does, with the share that stays. Recomputation repeats none of them.
    """
    return 4 * work.accumulation * sum(exchange_bytes(work, i) for i in range(work.shape.num_layers))
