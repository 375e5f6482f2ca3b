"""The cheapest change to a step that does not fit: smaller pieces, recomputation, 16-bit weights, more ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.training.planning import memory
from megatron_nucleus.training.planning.ledger import BF16_BYTES, FP32_BYTES
from megatron_nucleus.training.planning.liveness import GRANULARITIES
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.utils.errors import ConfigError

MOST_RANKS_TIMES = 64  # a world that is looked at: at most so many times the present one (own choice)


class Change(NamedTuple):
    """flags: what to add to the command. work: the step then. total_bytes: of its fullest moment."""

    flags: tuple[str, ...]
    work: Work
    total_bytes: int


def cheapest_change(
    work: Work, usable_bytes: int, seconds: Callable[[Work], float], *, fixed_recompute: bool = False
) -> Change | None:
    """The fastest of the settings near ``work`` that fit; None if none does.

    Tried in this order, until one fits: other micro-batches, recomputation and expert parallelism on the same ranks,
    which change no result; weights and averages in bf16; more ranks. All keep the global batch.

    Args:
        seconds: forecast of a step's time. fixed_recompute: the granularity cannot be changed.
    """
    layout = work.layout
    worlds = [layout.world * 2**i for i in range(1, MOST_RANKS_TIMES.bit_length())]
    stages = [
        [(layout.world, FP32_BYTES)],
        [(layout.world, BF16_BYTES)] if work.bf16 and work.weight_bytes == FP32_BYTES else [],
        *([(world, FP32_BYTES)] for world in worlds),
    ]
    for stage in stages:
        fitting = [
            change
            for world, weight_bytes in stage
            for change in _changes(work, world, min(weight_bytes, work.weight_bytes), fixed_recompute)
            if change.total_bytes <= usable_bytes
        ]
        if fitting:
            # Within a percent of the fastest, the one that changes least.
            times = [seconds(c.work) for c in fitting]
            near = [c for c, time in zip(fitting, times, strict=True) if time <= 1.01 * min(times)]
            return min(near, key=lambda c: (len(c.flags), c.total_bytes))
    return None


def _changes(work: Work, world: int, weight_bytes: int, fixed_recompute: bool) -> Iterator[Change]:
    """Every setting of a world."""
    total = work.layout.world * work.accumulation * work.batch.images
    if total % world:
        return
    share, experts = total // world, work.shape.num_experts
    for ep in (n for n in range(1, experts + 1) if world % n == 0 and experts % n == 0):
        if ep == 1 and work.exchange != "alltoall":
            continue
        try:
            layout = make_layout(world, experts=experts, ep=ep, replicate=work.layout.replicate)
        except ConfigError:  # copies that these ranks do not divide
            continue
        for micro in (n for n in range(1, share + 1) if share % n == 0):
            if ep > 1 and micro < work.chunks:
                continue
            for recompute in (work.recompute,) if fixed_recompute else GRANULARITIES:
                setting = dataclasses.replace(
                    work,
                    layout=layout,
                    batch=work.batch._replace(images=micro),
                    accumulation=share // micro,
                    recompute=recompute,
                    weight_bytes=weight_bytes,
                    state_bytes=min(weight_bytes, work.state_bytes),
                )
                if setting != work:
                    yield Change(_flags(work, setting), setting, memory.peak(setting).total)


def _flags(before: Work, after: Work) -> tuple[str, ...]:
    out = []
    if after.layout.world != before.layout.world:
        out.append(f"{after.layout.world} ranks")
    if after.batch.images != before.batch.images:
        out.append(f"--micro-batch-size {after.batch.images}")
    if after.recompute != before.recompute:
        out.append(f"--recompute-granularity {after.recompute}")
    if after.layout.ep != before.layout.ep:
        out.append(f"--expert-model-parallel-size {after.layout.ep}")
    if after.weight_bytes != before.weight_bytes:
        out.append("--master-weights bf16")
    if after.state_bytes != before.state_bytes:
        out.append("--state-dtype bf16")
    return tuple(out)
