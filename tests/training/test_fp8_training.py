"""FP8 in a training run: a curve beside the plain one's, exact resumption, and refusals before the first step."""

from __future__ import annotations

import pytest

from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.utils.errors import ConfigError
from tests.training.runs import rows, run_here, same_curve

FP8 = ("--fp8", "emulated", "--fp8-recipe", "rowwise")


def test_a_run_in_fp8_learns_resumes_and_leaves_an_ordinary_checkpoint(config_file, tmp_path):
    plain = run_here(config_file, tmp_path / "plain", "--train-steps", 6)
    whole = run_here(config_file, tmp_path / "whole", "--train-steps", 6, *FP8)
    run_here(config_file, tmp_path / "parts", "--train-steps", 3, *FP8)
    run_here(config_file, tmp_path / "parts", "--train-steps", 6, *FP8)
    same_curve(tmp_path / "whole", tmp_path / "parts")
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "whole")]
    assert losses[0] != losses[1]
    assert whole.loss == pytest.approx(plain.loss, rel=0.02)
    model = load_pipeline(tmp_path / "whole", device="cpu").model
    trained = dict(whole.state.model.named_parameters())
    assert all((p.detach() == trained[n].detach()).all() for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fp8", "emulated"), "needs --fp8-recipe"),
        (("--fp8", "torchao", "--fp8-recipe", "rowwise", "--bf16"), "--fp8 torchao .*Usable here: emulated"),
        (("--fp8", "emulated", "--fp8-recipe", "blockwise"), "no multiple of 128"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(config_file, tmp_path, flags, words):
    with pytest.raises(ConfigError, match=words):
        run_here(config_file, tmp_path / "run", "--train-steps", 1, *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_may_turn_fp8_on_and_off(config_file, tmp_path):
    """Weights and optimizer know nothing of it; the same samples give nearly the same losses."""
    for name, middle in (("plain", ()), ("mixed", FP8)):
        for steps, flags in ((2, ()), (4, middle), (6, ())):
            run_here(config_file, tmp_path / name, "--train-steps", steps, *flags)
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "mixed")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
