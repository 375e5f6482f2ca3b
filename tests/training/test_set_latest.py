"""Going on from any checkpoint of a run: --set-latest of tools/train.py, then the same command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_nucleus.export import native
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.training.runs import assert_identical, rows, run_here, same_curve, tensors
from tools.train import main


@pytest.fixture
def run_dir(config_file, tmp_path):
    """A run of six steps with checkpoints 2, 4 and 6."""
    run_here(config_file, tmp_path / "run", "--save-interval", 2)
    return tmp_path / "run"


def set_latest(config_file, run_dir, step, *flags) -> None:
    main(["--config", str(config_file), "--run-dir", str(run_dir), "--set-latest", str(step), *flags])


def test_the_run_goes_on_from_there(config_file, run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "whole")
    set_latest(config_file, run_dir, 2, "--json")
    target = run_dir / "checkpoints" / "step_00000002"
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{target}: the same command without --set-latest goes on from here"
    assert json.loads(out[1]) == {"latest": str(target)}
    assert rows(run_dir) == rows(tmp_path / "whole")  # it takes no step
    run_here(config_file, run_dir, "--save-interval", 2)
    assert_identical(tensors(run_dir, 6), tensors(tmp_path / "whole", 6))
    same_curve(run_dir, tmp_path / "whole")


def test_other_settings_from_there_and_back_again(config_file, run_dir, tmp_path):
    before = tensors(run_dir, 6)
    set_latest(config_file, run_dir, 4)
    run_here(config_file, run_dir, "--save-interval", 2, "--train-steps", 5, "--lr", 1e-3)
    assert [row["lr"] for row in rows(run_dir)][3:] == [2e-3, 1e-3]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000005\n"
    set_latest(config_file, run_dir, 6)  # left behind, and still there
    result = run_here(config_file, run_dir, "--train-steps", 6)
    assert result.state.step == 6
    weights = result.state.model.state_dict()
    assert all(torch.equal(value, before[f"model/{name}"]) for name, value in weights.items())


def test_what_cannot_be_gone_on_from_is_refused(config_file, run_dir, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--set-latest 3: \S+checkpoints holds no such .* of steps 2, 4, 6$"
    ):
        set_latest(config_file, run_dir, 3)
    with pytest.raises(ConfigError, match=r"--set-latest 3: \S+none/checkpoints holds no .*, but none$"):
        set_latest(config_file, tmp_path / "none", 3)
    step = run_dir / "checkpoints" / "step_00000002"
    next((step / "optimizer").glob("*.safetensors")).unlink()
    with pytest.raises(DataError, match=r"step_00000002/optimizer/\S+: missing"):
        set_latest(config_file, run_dir, 2)
    kept = {name: entry for name, entry in native.read_manifest(step).items() if "optimizer/" not in name}
    native.write_manifest(step, kept)
    with pytest.raises(
        ConfigError, match=r"--set-latest 2: .* holds weights and no optimizer .* --init-from"
    ):
        set_latest(config_file, run_dir, 2)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000006\n"
