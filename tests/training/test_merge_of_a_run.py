"""Warmup-Stable-Merge on a real run: windows anywhere in it, sums by hand, and a rate that knows no end."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.export.merge import merge
from tests.training.runs import rows, run_here, same_curve, tensors


def weights(run_dir, step) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint in float64."""
    return {
        name.removeprefix("model/"): value.double()
        for name, value in tensors(run_dir, step).items()
        if name.startswith("model/")
    }


def test_windows_of_a_run_merge_to_sums_by_hand_and_the_run_goes_on(config_file, tmp_path):
    run = tmp_path / "run"
    run_here(config_file, run, "--save-interval", 1, "--train-steps", 4)
    for name, until, used, values in (
        ("end", None, (2, 3, 4), (1 / 3**0.5, 1 / 2**0.5, 1.0)),
        ("middle", 3, (1, 2, 3), (1 / 3**0.5, 1 / 2**0.5, 1.0)),
    ):
        report = merge(run, tmp_path / name, "inverse_sqrt", last=3, until=until)
        assert [native.step_number(Path(path)) for path in report["inputs"]] == list(used)
        thetas = [weights(run, step) for step in used]
        merged = load_model(tmp_path / name).state_dict()
        for tensor, value in merged.items():
            by_hand = sum(w * theta[tensor] for w, theta in zip(values, thetas, strict=True)) / sum(values)
            torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=1e-9)
        # the same as the oldest weights and the updates after them, each times its multiplier
        d, (first, second, third) = report["decay_multipliers"], thetas
        for tensor, value in merged.items():
            moved = first[tensor] + d[1] * (second[tensor] - first[tensor])
            moved = moved + d[2] * (third[tensor] - second[tensor])
            torch.testing.assert_close(value.double(), moved, rtol=1e-6, atol=1e-9)
        assert any(not torch.equal(value.double(), thetas[-1][tensor]) for tensor, value in merged.items())
    # merging touched nothing: the run goes on, and is the one that was never looked at
    run_here(config_file, run, "--save-interval", 1, "--train-steps", 6)
    run_here(config_file, tmp_path / "straight", "--save-interval", 1, "--train-steps", 6)
    same_curve(run, tmp_path / "straight")


def test_the_rate_of_a_step_does_not_depend_on_where_the_run_ends(config_file, tmp_path):
    for steps in (3, 6):
        run_here(config_file, tmp_path / str(steps), "--train-steps", steps, "--save-interval", 0)
    short, long = ([row["lr"] for row in rows(tmp_path / str(steps))] for steps in (3, 6))
    assert short == long[:3] == [1e-3, 2e-3, 2e-3]
    assert long[3:] == [2e-3] * 3
