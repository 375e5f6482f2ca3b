"""The invariance matrix: one training run, whatever the number of ranks and however the model is spread over them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from megatron_nucleus.core.moe.router import capacity
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.types import TextFeatures
from tests.core.parallel_cases import GRID, IMAGES, SHAPE, Outcome, build, join, run_steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
TOLERANCE = 1e-6  # relative L2 norm of every tensor, fp32


@functools.cache
def reference(micro_batches: int = 1) -> Outcome:
    """One process. Cut into the micro-batches that the ranks have, it adds up the same terms as they do."""
    return run_steps({}, accumulation=micro_batches)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / max(np.linalg.norm(theirs), 1e-30))


def assert_same_run(outcome: Outcome, expected: Outcome, tolerance: float) -> None:
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=tolerance)
    np.testing.assert_allclose(outcome.norms, expected.norms, rtol=tolerance)
    for part in ("gradients", "weights"):
        ours, theirs = getattr(outcome, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        worst = max((distance(ours[name], theirs[name]), name) for name in ours)
        assert worst[0] <= tolerance, f"{part}: {worst}"


def assert_same_bits(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.losses == expected.losses
    assert outcome.norms == expected.norms
    for part in ("gradients", "weights"):
        for name, value in getattr(expected, part).items():
            assert np.array_equal(getattr(outcome, part)[name], value), f"{part} of {name}"


def settings(ep: int = 1, replicate: int = 1, **more) -> dict:
    return {"expert_model_parallel_size": ep, "data_parallel_replicate_size": replicate, **more}


# world, EP, copies of the dense parameters (1 = FSDP, world = plain copies, between = HSDP)
GRIDS = [
    (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2),
    (4, 1, 1), (4, 2, 1), (4, 4, 1),
    (4, 1, 2), (4, 2, 2), (4, 4, 2),
    (4, 1, 4), (4, 2, 4), (4, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(("world", "ep", "replicate"), GRIDS)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_grid_trains_as_one_process(world, ep, replicate, recompute, accumulation, tmp_path):
    config = settings(ep, replicate, recompute_granularity=recompute)
    outcomes = run_ranks(world, run_steps, tmp_path, config, accumulation=accumulation)
    for outcome in outcomes:  # every rank reports the same bits
        assert_same_bits(outcome, outcomes[0])
    assert_same_run(outcomes[0], reference(world * accumulation), TOLERANCE)
    whole_batch = reference()
    for part in ("gradients", "weights"):
        ours, theirs = (
            np.concatenate([v.ravel() for v in getattr(x, part).values()]) for x in (outcomes[0], whole_batch)
        )
        assert distance(ours, theirs) <= TOLERANCE, part


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 2)])
def test_recomputation_changes_no_bit(world, ep, granularity, tmp_path):
    plain = run_ranks(world, run_steps, tmp_path, settings(ep))[0]
    again = run_ranks(world, run_steps, tmp_path, settings(ep, recompute_granularity=granularity))[0]
    assert_same_bits(again, plain)


@pytest.mark.parametrize("ep", [2, 4])
def test_waiting_for_the_all_to_all_changes_no_bit(ep, tmp_path):
    overlapped = run_ranks(4, run_steps, tmp_path, settings(ep))[0]
    waiting = run_ranks(4, run_steps, tmp_path, settings(ep, moe_shared_expert_overlap=False))[0]
    assert_same_bits(waiting, overlapped)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_chunks_give_the_same_run(chunks, recompute, tmp_path):
    config = settings(2, moe_overlap_chunks=chunks, recompute_granularity=recompute)
    assert_same_run(run_ranks(4, run_steps, tmp_path, config)[0], reference(4), TOLERANCE)


def compiled_steps(recompute: str) -> list[Outcome]:
    return [run_steps(settings(2, compile_blocks=True, recompute_granularity=g)) for g in ("none", recompute)]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_run(tmp_path):
    """Fused arithmetic rounds differently; recomputing it and its exchanges changes nothing."""
    plain, again = run_ranks(2, compiled_steps, tmp_path, "full", timeout_s=280)[0]
    assert_same_run(plain, reference(2), 3 * TOLERANCE)
    assert_same_bits(again, plain)
    assert again.all_to_all_bytes == plain.all_to_all_bytes


def bf16_step(rank: int, ep: int) -> tuple[float, set[str], set[str]]:
    """(loss of ``rank``'s images, dtypes of stored weights, dtypes of their gradients)."""
    config = ParallelConfig(**settings(ep))
    parallel = join(config)
    rank = parallel.rank if parallel.world > 1 else rank
    model = build(parallel, config, bf16=True)
    g = torch.Generator().manual_seed(rank)
    latents, text = torch.randn(4, 12, SHAPE.patch_channels, generator=g), torch.randn(4, 3, 24, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(latents, torch.rand(4, generator=g), TextFeatures(text), GRID)
    loss = velocity.float().square().mean()
    loss.backward()
    params = [p for p in model.parameters() if p.requires_grad]
    return loss.item(), {str(p.dtype) for p in params}, {str(p.grad.dtype) for p in params}


def test_bf16_gathers_rounded_weights_and_keeps_fp32_ones(tmp_path):
    """The matrix products see the same bf16 values as one process under autocast; the few others are rounded, too."""
    for rank, (loss, stored, gradients) in enumerate(run_ranks(4, bf16_step, tmp_path, 0, 2)):
        assert stored == gradients == {"torch.float32"}
        alone = bf16_step(rank, 1)[0]
        assert abs(loss - alone) <= 0.005 * alone


def test_keeping_gathered_weights_changes_no_bit(tmp_path):
    freed = run_ranks(4, run_steps, tmp_path, settings(2))[0]
    kept = run_ranks(4, run_steps, tmp_path, settings(2, reshard_after_forward=False))[0]
    assert_same_bits(kept, freed)


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_all_to_all_bytes_are_the_theoretical_count(ep, recompute, chunks, tmp_path):
    """Two exchanges per layer, forward and backward, of E*B*C*D values each; none is repeated."""
    config = settings(ep, recompute_granularity=recompute, moe_overlap_chunks=chunks)
    outcome = run_ranks(4, run_steps, tmp_path, config, steps=1)[0]
    tokens, E, D, B = GRID[0] * GRID[1], SHAPE.num_experts, SHAPE.width, IMAGES // 4
    rows = [
        E * B * capacity(SHAPE.capacity_factors[layer], tokens, E)
        for layer in range(SHAPE.num_layers)
        if SHAPE.is_moe(layer)
    ]
    assert outcome.all_to_all_bytes == 4 * sum(rows) * D * 4


def test_one_expert_per_rank_over_sixteen_ranks(tmp_path):
    """EP = E = 16: every parameter gets a gradient and moves, as with one process."""
    import dataclasses

    shape = dataclasses.replace(SHAPE, num_experts=16)
    before = run_steps({}, steps=0, shape=shape).weights
    expected = run_steps({}, shape=shape, accumulation=16)
    outcome = run_ranks(16, run_steps, tmp_path, settings(16), shape=shape)[0]
    assert_same_run(outcome, expected, 3 * TOLERANCE)  # sixteen partial sums of one image each
    for name, gradient in outcome.gradients.items():
        if "experts." in name:
            assert (np.abs(gradient).reshape(16, -1).sum(1) > 0).all(), f"an expert of {name} has no gradient"
        assert np.abs(gradient).sum() > 0, name
        assert not np.array_equal(outcome.weights[name], before[name]), f"{name} did not move"
    frozen = before.keys() - outcome.gradients.keys()
    assert all(name.endswith("text_q_norm.weight") for name in frozen)
