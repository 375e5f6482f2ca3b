"""The search against every setting assessed by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.planning.plan import PlanConfig, assess, work_of
from megatron_nucleus.training.planning.search import search
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import read_yaml
from megatron_nucleus.utils.errors import ConfigError

STAGE_1 = Path(__file__).parents[3] / "examples/nucleus_image_17b/stage1_256.yaml"


def published() -> RunConfig:
    return cfg.from_dict(RunConfig, read_yaml(STAGE_1).values)


def test_the_first_is_the_fastest_that_fits():
    run, plan = published(), PlanConfig(world_size=64)
    plans = search(run, plan)
    assert len(plans) == 7 * 7 * 3  # EP 1..64, micro-batch 1..64, three granularities
    assert not all(p.fits for p in plans)
    fastest = min((p for p in plans if p.fits), key=lambda p: p.time.step_s)
    assert plans[0].time.step_s == fastest.time.step_s
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    chosen = plans[0].work
    parallel = dataclasses.replace(
        run.parallel,
        expert_model_parallel_size=chosen.layout.ep,
        recompute_granularity=chosen.recompute,
    )
    training = dataclasses.replace(run.training, micro_batch_size=chosen.batch.images)
    setting = dataclasses.replace(run, parallel=parallel, training=training)
    assert assess(setting, plan, work_of(setting, plan)) == plans[0]


def test_less_memory_never_gives_a_faster_step():
    steps = [
        search(published(), PlanConfig(world_size=64, other_memory_gib=held))[0].time.step_s
        for held in (0.0, 30.0, 55.0)
    ]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_chunks_need_images():
    run = published()
    run = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, moe_overlap_chunks=4))
    micro = {p.work.batch.images for p in search(run, PlanConfig(world_size=64)) if p.work.layout.ep > 1}
    assert min(micro) == 4


def test_bad_worlds():
    with pytest.raises(ConfigError, match="--global-batch-size 4096: must be a multiple of the 48 ranks"):
        search(published(), PlanConfig(world_size=48))
    with pytest.raises(ConfigError, match="--memory-margin-frac 1.0"):
        PlanConfig(world_size=1, memory_margin_frac=1.0)
