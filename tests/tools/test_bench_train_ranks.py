"""tools/bench_train.py over several ranks: the bytes, whose times count, and the same function on every grid."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.training import flops
from megatron_nucleus.training.benchmark.benchmark import (
    BenchConfig,
    make_workload,
    randomise_zeros,
    run_benchmark,
)
from megatron_nucleus.training.benchmark.breakdown import of_slowest
from megatron_nucleus.training.benchmark.parts import Spread, Timed, Workload, call_ours, interleave
from megatron_nucleus.training.profiling.regions import named_regions
from tests.core.parallel_cases import SHAPE, build, join, whole
from tests.ranks import run_ranks
from tests.tools.test_bench_train import FAST, small_shape
from tests.training.test_regions import Listing

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")


def printed(argv: list[str], rank: str | None = None) -> str:
    """What the program prints on this rank; rank: which one it takes itself for when it prints."""
    from tools.bench_train import main

    if rank is not None:
        os.environ["RANK"] = rank
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*argv, "--json"])
    return out.getvalue()


def figures(world: int, folder, *flags: str) -> dict:
    """The JSON object, which is the same on every rank."""
    texts = run_ranks(world, printed, folder, [*FAST, "--global-batch-size", "8", *flags], "0")
    results = [json.loads(text.splitlines()[-1]) for text in texts]
    assert results == [results[0]] * world
    return results[0]


EP2 = ("--expert-model-parallel-size", "2")
ROW = (
    4 * 3 * 128
)  # values a layer sends per image: 4 experts take 3 of 6 tokens each, 128 wide; one MoE layer


@pytest.mark.parametrize(
    ("world", "flags", "expected"),
    [
        (2, EP2, 4 * 4 * ROW * 4),  # exchanges x images x values x bytes
        (2, (*EP2, "--forward-only"), 2 * 4 * ROW * 4),
        (2, (*EP2, "--bf16", "--moe-overlap-chunks", "2"), 4 * 4 * ROW * 2),
        (2, (), 0),
        (4, (*EP2, "--micro-batch-size", "1", "--recompute-granularity", "full"), 2 * 4 * ROW * 4),
        (4, ("--expert-model-parallel-size", "4"), 4 * 2 * ROW * 4),
    ],
)
def test_all_to_all_bytes_are_those_of_the_theory(world, flags, expected, tmp_path):
    result = figures(world, tmp_path, *flags)
    assert result["all_to_all_bytes_per_rank_per_step"] == expected
    assert result["all_to_all_bytes_theory"] == expected


def test_a_step_is_that_of_all_ranks_and_mfu_that_of_a_device(tmp_path):
    flags = (*EP2, "--data-parallel-replicate-size", "2", "--micro-batch-size", "1", "--peak-tflops", "0.5")
    result = figures(4, tmp_path, *flags)
    assert (result["ranks"], result["expert_model_parallel_size"]) == (4, 2)
    assert result["data_parallel_replicate_size"] == 2
    assert result["dense_grid"] == {"replicate": 2, "shard": 2}
    assert result["expert_grid"] == {"expert_replicate": 2, "efsdp": 1, "ep": 2}
    parts = [result[name]["median_s"] for name in ("accumulation", "forward_backward", "optimizer")]
    assert result["step_s"] == pytest.approx(sum(parts))
    assert result["samples_per_step"] == 8
    assert result["samples_per_s"] == pytest.approx(8 / result["step_s"])
    expected = 8 * flops.training_flops_per_image(small_shape(), tokens=6, text_tokens=5)
    assert result["model_flops_per_step"] == expected
    assert result["model_tflops"] == pytest.approx(expected / result["step_s"] / 4 / 1e12)
    assert result["mfu"] == pytest.approx(result["model_tflops"] / 0.5)
    assert all(count > 0 for count in result["muon_bytes_per_rank_per_step"].values())


def test_rank_0_alone_prints(tmp_path):
    flags = ["--record", str(tmp_path / "t.md")]
    first, second = run_ranks(2, printed, tmp_path, [*FAST, *EP2, *flags])
    assert second == ""
    (entry,) = json.loads((tmp_path / "t.json").read_text())
    assert entry["command"].startswith("torchrun --nproc-per-node 2 tools/bench_train.py --num-layers")
    assert entry["result"]["ranks"] == 2
    assert "2 ranks: dense replicate 1 x shard 2; experts expert_replicate 1 x efsdp 1 x ep 2" in first
    assert "0.05 MiB into all-to-alls, its own share included (theory 0.05 MiB); Muon gather" in first


def small_work() -> Workload:
    bench = BenchConfig(text_tokens=3)
    return make_workload(SHAPE, bench, (2, 3), micro_batch_size=2, accumulation=1, bf16=False, device=CPU)


def muon_bytes() -> tuple[dict, dict]:
    """(as reported, of this rank)."""
    config = ParallelConfig()
    parallel = join(config)
    bench = BenchConfig(steps=1, warmup=0, text_tokens=3)
    model = build(parallel, config)
    result = run_benchmark(model, bench, OptimizerConfig(), small_work(), None, parallel)
    own = build_optimizer(build(parallel, config), OptimizerConfig()).muon.traffic()
    return result["muon_bytes_per_rank_per_step"], own


def test_muon_bytes_are_those_of_the_rank_that_sends_most(tmp_path):
    results = run_ranks(3, muon_bytes, tmp_path)
    own = [own for _, own in results]
    assert own[0] != own[1], "equal shares would not tell the most from the first"
    assert results[0][0] == {stage: max(rank[stage] for rank in own) for stage in own[0]}


def alternately_slow() -> tuple[Spread, Spread]:
    """Each rank sleeps in every other run of one part, and rank 1 comes late to another."""
    rank, runs = dist.get_rank(), itertools.count()

    def slow() -> None:
        time.sleep(0.05 if (next(runs) + rank) % 2 else 0.0)

    def late(part: str) -> None:
        time.sleep(0.5 * rank)

    slept = interleave({"part": slow}, 4, 0, CPU, dist.group.WORLD)["part"]
    met = interleave({"part": dist.barrier}, 3, 1, CPU, dist.group.WORLD, late)["part"]
    return slept, met


def test_times_are_of_the_slowest_rank_and_without_the_wait_for_its_start(tmp_path):
    first, second = run_ranks(2, alternately_slow, tmp_path)
    assert first == second
    slept, met = first
    assert slept.min_s >= 0.05
    assert slept.repeats == 4
    assert met.min_s < 0.4


def uneven_rows() -> dict[str, list[float]]:
    """Rank 0 is slow in the first repetition, rank 1 in the second; each waits for the other in `combine`."""
    fast = {"step": 5.0, "forward": 4.0, "combine": 3.0}
    slow = {"step": 6.0, "forward": 6.0, "combine": 0.0}
    rows = [slow, fast] if dist.get_rank() == 0 else [fast, slow]
    return of_slowest(rows, dist.group.WORLD)


def test_a_breakdown_is_of_one_rank_so_that_its_parts_add_up(tmp_path):
    """The largest of each part over the ranks would count the wait of one rank beside the work of the other."""
    for found in run_ranks(2, uneven_rows, tmp_path):
        assert found == {"step": [6.0, 6.0], "forward": [6.0, 6.0], "combine": [0.0, 0.0]}


def randomised(settings: dict) -> dict[str, np.ndarray]:
    config = ParallelConfig(**settings)
    model = build(join(config), config)
    before = {name: whole(p) for name, p in model.named_parameters()}
    randomise_zeros(model)
    after = {name: whole(p) for name, p in model.named_parameters()}
    for name, values in after.items():
        if before[name].any():
            assert np.array_equal(values, before[name]), f"{name} did not start at zero"
        else:
            assert 0.01 < values.std() < 0.03, name
    return after


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (3, {}),  # no number of rows is a multiple of the ranks
        (4, {"expert_model_parallel_size": 2, "data_parallel_replicate_size": 2}),
    ],
)
def test_every_grid_times_the_same_function(world, settings, tmp_path):
    alone = randomised({})
    for values in run_ranks(world, randomised, tmp_path, settings):
        assert values.keys() == alone.keys()
        assert [name for name in alone if not np.array_equal(values[name], alone[name])] == []


def named_parts(settings: dict) -> tuple[list[str], bool]:
    """(regions of a micro-batch as they begin, whether naming them changed any gradient)."""
    config = ParallelConfig(**settings)
    model, work = build(join(config), config), small_work()
    randomise_zeros(model)
    timed = Timed(model, lambda: call_ours(model, work), work)

    def gradients() -> dict[str, torch.Tensor]:
        timed.forward_backward()
        return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}

    plain, heard = gradients(), Listing()
    with named_regions(model, heard):
        named = gradients()
    assert heard.open == []
    return heard.entered, any(not torch.equal(named[name], plain[name]) for name in plain)


def test_regions_of_rows_that_travel(tmp_path):
    """They arrive and leave inside of the experts; in the backward pass the other way round."""
    for entered, changed in run_ranks(2, named_parts, tmp_path, {"expert_model_parallel_size": 2}):
        assert not changed
        layers = entered.count("experts") // 2
        assert layers > 0
        assert (
            entered.count("dispatch") == entered.count("combine") == 4 * layers
        )  # there and back, both passes
        first = entered.index("experts")
        assert entered[first : first + 4] == ["experts", "dispatch", "combine", "combine"]
        back = len(entered) - 1 - entered[::-1].index("experts")
        assert entered[back : back + 3] == ["experts", "combine", "dispatch"]


def parts_of_a_micro_batch(settings: dict) -> int:
    """Number of gradients found right."""
    config = ParallelConfig(**settings)
    model, work = build(join(config), config), small_work()
    randomise_zeros(model)
    timed = Timed(model, lambda: call_ours(model, work), work)

    def gradients(*micro_batches: bool) -> dict[str, torch.Tensor]:
        for number, last in enumerate(micro_batches):
            timed.forward_backward(number == 0, last)
        return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}

    timed.forward()
    gathered = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert gathered == [], "the next part would gather less than a training step does"
    once, twice = gradients(True), gradients(False, True)
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        assert gradient.any(), name
        assert torch.equal(twice[name], 2 * gradient), (
            f"{name}: the copies did not wait for the last micro-batch"
        )
    return len(once)


@pytest.mark.parametrize("reshard", [True, False])
def test_parts_are_those_of_a_training_step(reshard, tmp_path):
    """A forward pass leaves nothing gathered; copies exchange the sum over the micro-batches with the last one."""
    settings = {"data_parallel_replicate_size": 2, "reshard_after_forward": reshard}
    checked = run_ranks(2, parts_of_a_micro_batch, tmp_path, settings)
    assert checked[0] == checked[1] > 40
