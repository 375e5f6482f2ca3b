"""The whole model never exists on one rank: each allocates and draws what it holds."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.parallelize import materialise, parallelize
from tests.core.parallel_cases import SHAPE, join, whole
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
BIG = dataclasses.replace(SHAPE, num_experts=16, moe_intermediate_dim=8192)  # 50 MB of experts a layer


def resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def materialised(settings: dict) -> tuple[int, int]:
    """(bytes of this rank's weights, growth of its peak memory)."""
    config = ParallelConfig(**settings)
    parallel = join(config, BIG)
    with torch.device("meta"):
        model = NucleusTransformer(BIG)
    parallelize(model, config, parallel)
    before = resident_bytes()
    materialise(model, parallel.device, seed=0)
    held = sum(p.to_local().nbytes for p in model.parameters())
    return held, resident_bytes() - before


@pytest.mark.parametrize("ep", [1, 4])
def test_a_rank_allocates_its_share(ep, tmp_path):
    with torch.device("meta"):
        total = sum(p.nbytes for p in NucleusTransformer(BIG).parameters())
    assert total > 90e6
    for held, growth in run_ranks(4, materialised, tmp_path, {"expert_model_parallel_size": ep}):
        assert held < 0.27 * total
        assert growth < 0.45 * total  # its share, one expert and one dense matrix while they are drawn


def initial_weights(settings: dict) -> dict:
    config = ParallelConfig(**settings)
    parallel = join(config)
    with torch.device("meta"):
        model = parallelize(NucleusTransformer(SHAPE), config, parallel)
    materialise(model, parallel.device, seed=5)
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("world", "ep", "replicate"), [(2, 2, 1), (4, 2, 2), (4, 1, 1)])
def test_initial_weights_do_not_depend_on_the_layout(world, ep, replicate, tmp_path):
    settings = {"expert_model_parallel_size": ep, "data_parallel_replicate_size": replicate}
    ours = run_ranks(world, initial_weights, tmp_path, settings)[0]
    for name, value in NucleusTransformer(SHAPE, seed=5).named_parameters():
        assert torch.equal(torch.from_numpy(ours[name]), value.detach()), name


# One of 64 ranks of the published model, without the other 63: a process group that sends nothing.
PUBLISHED = """
import json, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelConfig, resolve_shape
from megatron_nucleus.core.parallel_state import *
from megatron_nucleus.core.parallelize import parallelize

rank, ep = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("fake", rank=rank, world_size=64, store=FakeStore())
layout = make_layout(64, experts=64, ep=ep)
dense = init_device_mesh("cpu", (layout.replicate, layout.shard), mesh_dim_names=DENSE_AXES)
expert = init_device_mesh("cpu", tuple(getattr(layout, a) for a in EXPERT_AXES), mesh_dim_names=EXPERT_AXES)
state = ParallelState(rank, 64, rank % 8, layout, torch.device("cpu"), dense, expert, dist.group.WORLD)
with torch.device("meta"):
    model = NucleusTransformer(resolve_shape(ModelConfig(preset="nucleus_image_17b")))
parallelize(model, ParallelConfig(expert_model_parallel_size=ep), state)
sizes = {n: (p.numel(), p.to_local().numel()) for n, p in model.named_parameters()}
experts = {n: s for n, s in sizes.items() if ".experts." in n}
print(json.dumps({
    "total": sum(t for t, _ in sizes.values()),
    "experts_total": sum(t for t, _ in experts.values()),
    "experts_held": sum(h for _, h in experts.values()),
    "held": sum(h for _, h in sizes.values()),
}))
"""


@pytest.mark.parametrize(("rank", "ep"), [(0, 64), (63, 64), (37, 8)])
def test_each_of_64_ranks_of_the_published_model_holds_one_expert_a_layer(rank, ep):
    command = [sys.executable, "-c", PUBLISHED, str(rank), str(ep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["total"] == 16_922_679_296
    assert sizes["experts_held"] == sizes["experts_total"] // 64
    assert sizes["held"] <= sizes["total"] / 64 * 1.01
