"""Whole runs with bf16 weights: exact resume, half the bytes, over ranks, and what other tools do with the result."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.utils.errors import ConfigError
from tests.ranks import run_ranks
from tests.support import tool
from tests.training.runs import assert_identical, rows, run_here, same_curve, tensors, train_rank

BF16 = ["--bf16", "--master-weights", "bf16"]
BOTH = [*BF16, "--state-dtype", "bf16"]
DRAW = ["--sample-interval", 6, "--sample-prompts", "a red circle"]


def part_bytes(run_dir, part: str) -> int:
    folder = run_dir / "checkpoints" / native.step_name(6)
    return sum(path.stat().st_size for path in native.part_files(folder, part))


@pytest.mark.parametrize(
    "flags",
    [
        BF16,
        [*BOTH, "--optimizer", "adamw", "--micro-batch-size", 4],
        [*BOTH, "--fp8", "emulated", "--fp8-recipe", "rowwise", "--recompute-granularity", "selective"],
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(flags, config_file, tmp_path):
    run_here(config_file, tmp_path / "whole", *flags)
    run_here(config_file, tmp_path / "parts", *flags, "--train-steps", 3)
    run_here(config_file, tmp_path / "parts", *flags)
    assert_identical(tensors(tmp_path / "whole", 6), tensors(tmp_path / "parts", 6))
    same_curve(tmp_path / "whole", tmp_path / "parts")


def test_the_run_follows_that_of_fp32_in_half_the_bytes(config_file, tmp_path):
    run_here(config_file, tmp_path / "wide", "--bf16")
    run_here(config_file, tmp_path / "narrow", *BOTH, *DRAW)
    for ours, theirs in zip(rows(tmp_path / "narrow"), rows(tmp_path / "wide"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    narrow = tensors(tmp_path / "narrow", 6)
    assert {t.dtype for n, t in narrow.items() if n.startswith("model/")} == {torch.bfloat16}
    assert part_bytes(tmp_path / "narrow", "model") < 0.55 * part_bytes(tmp_path / "wide", "model")
    assert part_bytes(tmp_path / "narrow", "optimizer") < 0.6 * part_bytes(tmp_path / "wide", "optimizer")
    start = load_model(tmp_path / "narrow").state_dict()
    for name, value in start.items():
        assert torch.equal(value, narrow[f"model/{name}"])
    assert (tmp_path / "narrow" / "samples" / "step_00000006.png").is_file()


@pytest.mark.dist
@pytest.mark.parametrize("flags", [[], ["--expert-model-parallel-size", 2]])
def test_two_ranks_resume_bit_for_bit_and_follow_one_process(flags, config_file, tmp_path):
    run_here(config_file, tmp_path / "one", *BOTH)
    flags = [*BOTH, *DRAW, *flags]
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "whole", *flags)
    for steps in (3, 6):
        run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "parts", *flags, "--train-steps", steps)
    assert_identical(tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6))
    one, two = tensors(tmp_path / "one", 6), tensors(tmp_path / "whole", 6)
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in two.items()}
    for ours, theirs in zip(rows(tmp_path / "whole"), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)


def test_precision_is_kept_on_resume_and_changed_by_a_new_run(config_file, tmp_path):
    run_here(config_file, tmp_path / "wide", "--bf16")
    with pytest.raises(
        ConfigError, match=r"this run needs .* torch.bfloat16.*to change them, start a new run"
    ):
        run_here(config_file, tmp_path / "wide", *BF16, "--train-steps", 8)
    start = ["--train-steps", 1, "--seed", 1, "--lr", 0, "--lr-warmup-steps", 0]
    run_here(config_file, tmp_path / "narrow", *BF16, *start, "--init-from", tmp_path / "wide")
    wide, narrow = tensors(tmp_path / "wide", 6), tensors(tmp_path / "narrow", 1)
    names = [n for n in wide if n.startswith("model/")]
    assert all(
        torch.equal(narrow[n], wide[n].to(torch.bfloat16)) for n in names
    )  # nearest: read, not updated
    run_here(config_file, tmp_path / "back", "--bf16", *start, "--init-from", tmp_path / "narrow")
    back = tensors(tmp_path / "back", 1)
    assert all(torch.equal(back[n], narrow[n].float()) for n in names)
    with pytest.raises(ConfigError, match=r"exists only in this run|this run needs"):
        run_here(config_file, tmp_path / "new", *BOTH, "--init-from", tmp_path / "wide", "--init-optimizer")


def test_bf16_weights_need_bf16_arithmetic_and_few_micro_batches(config_file, tmp_path):
    with pytest.raises(ConfigError, match="--master-weights bf16: .*give --bf16, too"):
        run_here(config_file, tmp_path / "run", "--master-weights", "bf16")
    with pytest.raises(ConfigError, match="--master-weights.*fp16"):
        run_here(config_file, tmp_path / "run", "--bf16", "--master-weights", "fp16")
    with pytest.raises(ConfigError, match="would sum 128 micro-batches in bf16.*at most 64: give a larger"):
        run_here(config_file, tmp_path / "run", *BF16, "--global-batch-size", 128, "--micro-batch-size", 1)
    assert not (tmp_path / "run").exists()


def test_tools_take_the_checkpoints(config_file, tmp_path):
    """Merged in fp64 and rounded once; converted both ways; sampled from."""
    run = tmp_path / "run"
    run_here(config_file, run, *BOTH)
    tool(
        "merge_checkpoints", "--checkpoints", run, "--output", tmp_path / "merged", "--last", 2, "--weights", "uniform"
    )  # fmt: skip
    merged = load_model(tmp_path / "merged").state_dict()
    a, b = tensors(run, 3), tensors(run, 6)
    for name, value in merged.items():
        mean = (a[f"model/{name}"].double() + b[f"model/{name}"].double()) / 2
        assert torch.equal(value, mean.to(torch.bfloat16)), name
    tool("convert_checkpoint", "--input", run, "--to", "hf", "--output", tmp_path / "hf")
    back = load_model(tmp_path / "hf").state_dict()
    assert all(torch.equal(back[n], b[f"model/{n}"]) for n in back)
    tool("sample", "--checkpoint", run, "--prompt", "a red circle", "--output", tmp_path / "pictures")
    assert list((tmp_path / "pictures").glob("*.png"))
