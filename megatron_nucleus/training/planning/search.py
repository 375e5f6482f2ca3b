"""Looks through expert parallelism, micro-batch and recomputation for the fastest forecast that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.planning.liveness import GRANULARITIES
from megatron_nucleus.training.planning.plan import Plan, PlanConfig, assess, shape_of, work_of
from megatron_nucleus.utils.errors import ConfigError


def search(run: RunConfig, plan: PlanConfig) -> list[Plan]:
    """Every setting, those that fit first, the fastest first; of the others the smallest first.

    Of equal forecasts the one with the larger micro-batch comes first. Everything else stays as ``run`` has it.

    Raises:
        ConfigError: a global batch that the ranks do not divide, or settings that training would refuse.
    """
    if run.training.global_batch_size % plan.world_size:
        raise ConfigError(
            f"--global-batch-size {run.training.global_batch_size}: must be a multiple of the {plan.world_size} ranks"
        )
    plans = [assess(setting, plan, work_of(setting, plan)) for setting in _settings(run, plan)]
    return sorted(
        plans,
        key=lambda p: (not p.fits, p.time.step_s if p.fits else p.memory.total, -p.work.batch.images),
    )


def _settings(run: RunConfig, plan: PlanConfig) -> Iterator[RunConfig]:
    share, experts = run.training.global_batch_size // plan.world_size, shape_of(run).num_experts
    for ep in _divisors(plan.world_size, experts):
        for micro in _divisors(share):
            if ep > 1 and micro < run.parallel.moe_overlap_chunks:
                continue
            for recompute in GRANULARITIES:
                yield dataclasses.replace(
                    run,
                    training=dataclasses.replace(run.training, micro_batch_size=micro),
                    parallel=dataclasses.replace(
                        run.parallel, expert_model_parallel_size=ep, recompute_granularity=recompute
                    ),
                )


def _divisors(*numbers: int) -> list[int]:
    """Common divisors."""
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
