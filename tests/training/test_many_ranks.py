"""Whole runs over several ranks: the same curve as one process, the same files, resumed on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_nucleus.export import native
from tests.ranks import run_ranks
from tests.training.runs import assert_identical, curve, rows, run_here, same_curve, tensors, train_rank

pytestmark = pytest.mark.dist
EXACT = ("step", "samples_seen", "lr", "skipped", "bucket", "substituted")


def close_curves(a, b) -> None:
    """The same run up to the order of fp32 sums."""
    ours, theirs = curve(a), curve(b)
    assert [[row[k] for k in EXACT] for row in ours] == [[row[k] for k in EXACT] for row in theirs]
    for key in ("loss", "flow_loss", "router_z_loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in ours], [r[key] for r in theirs], rtol=2e-5, err_msg=key)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, ["--expert-model-parallel-size", 2]),
        (4, ["--expert-model-parallel-size", 4, "--recompute-granularity", "full"]),
        (4, ["--expert-model-parallel-size", 2, "--data-parallel-replicate-size", 2]),
        (4, ["--data-parallel-replicate-size", 4, "--micro-batch-size", 1]),
    ],
)
def test_a_run_over_ranks_is_the_run_of_one_process(world, flags, config_file, tmp_path):
    run_here(config_file, tmp_path / "one")
    results = run_ranks(world, train_rank, tmp_path, config_file, tmp_path / "many", *flags)
    assert results == [results[0]] * world
    assert results[0]["samples_seen"] == 48
    close_curves(tmp_path / "many", tmp_path / "one")
    ours, theirs = tensors(tmp_path / "many", 6), tensors(tmp_path / "one", 6)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        assert (ours[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    assert len(list((tmp_path / "many" / "logs").glob("rank_*.log"))) == world


def test_resumed_over_the_same_ranks_bit_for_bit(config_file, tmp_path):
    flags = ["--expert-model-parallel-size", 2, "--async-save"]
    run_ranks(4, train_rank, tmp_path, config_file, tmp_path / "whole", *flags)
    for steps in (2, 4, 6):
        run_ranks(4, train_rank, tmp_path, config_file, tmp_path / "parts", *flags, "--train-steps", steps)
    assert_identical(tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6))
    same_curve(tmp_path / "parts", tmp_path / "whole")


def test_resumed_on_other_numbers_of_ranks_draws_the_same_samples(config_file, tmp_path):
    """4 -> 2 -> 1 -> 4 ranks, other layouts each time: one curve."""
    run_here(config_file, tmp_path / "one", "--train-steps", 8)
    run_dir = tmp_path / "many"
    for world, steps, flags in (
        (4, 2, ["--expert-model-parallel-size", 4]),
        (2, 4, ["--data-parallel-replicate-size", 2]),
        (1, 6, []),
        (4, 8, ["--expert-model-parallel-size", 2]),
    ):
        run_ranks(world, train_rank, tmp_path, config_file, run_dir, *flags, "--train-steps", steps)
    close_curves(run_dir, tmp_path / "one")
    saved = native.read_state(run_dir / "checkpoints" / native.step_name(8))
    assert saved["samples_seen"] == 64


def test_previews_are_drawn_by_all_ranks_and_written_once(config_file, tmp_path):
    flags = ["--sample-interval", 6, "--sample-prompts", "a red circle", "--expert-model-parallel-size", 2]
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "many", *flags)
    assert [p.name for p in (tmp_path / "many" / "samples").iterdir()] == ["step_00000006.png"]
    run_here(config_file, tmp_path / "one", *flags[:-2])
    from PIL import Image

    ours, theirs = (
        np.asarray(Image.open(tmp_path / run / "samples" / "step_00000006.png"), np.int16)
        for run in ("many", "one")
    )
    assert np.abs(ours - theirs).max() <= 2


def test_logged_bytes_are_the_count(config_file, tmp_path):
    """E*B*C*D values per exchange, two exchanges forward and two backward, one MoE layer, fp32."""
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "run", "--expert-model-parallel-size", 2)
    state = native.read_state(tmp_path / "run" / "checkpoints" / native.step_name(6))
    shape = state["model"]
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    tokens = (32 // state["codec"]["stride_px"] // shape["patch_size"]) ** 2
    C = -(-2 * tokens // shape["num_experts"])
    expected = 4 * shape["num_experts"] * 4 * C * width * 4
    assert [row["all_to_all_bytes"] for row in rows(tmp_path / "run")] == [expected] * 6
    json.dumps(state)
