"""tools/bench_data.py: flags, what it asks of a training run, and its tables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError, UserError
from tests.data.pictures import scene
from tools import bench_data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "12"], "--sizes 12: WIDTHxHEIGHT"),
        (["--sizes", "0x5"], "--sizes 0x5: WIDTHxHEIGHT"),
        (["--count", "0"], "--count 0: 1 or more"),
        (["--workers", "-1"], "--workers -1: 0 or more"),
        (["--step-s", "-0.1"], "--step-s -0.1: 0 or more"),
        (["--step-s", "nan"], "--step-s: expected a finite number"),
        (["--train-steps", "5"], "--train-steps 5: 0, or 10 and more"),
        (["--record", "figures.txt"], "must be a Markdown file"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_made(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bench_data.main([*words, "--work", str(tmp_path / "w")])
    assert not (tmp_path / "w").exists()


def test_a_training_run_gets_flags_that_exist_and_its_figures_are_medians(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = tmp_path / "train-pillow-1"
        folder.mkdir()
        waits = ((9.0, 10.0), (0.1, 0.4), (0.3, 0.6), (0.2, 1.0))  # the first is the start
        rows = (json.dumps({"data_s": data_s, "step_s": step_s}) for data_s, step_s in waits)
        (folder / "metrics.jsonl").write_text("\n".join(rows))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    row = bench_data.train(SimpleNamespace(root=tmp_path / "d"), "pillow", 1, 20, tmp_path)
    assert row["data_s"] == 0.2
    assert row["step_s"] == 0.6
    assert row["waiting_frac"] == 0.25
    assert Path(commands[0][1]).name == "train.py"
    settings, _ = parse_run(commands[0][2:], Parser())
    assert settings.data.data_path == str(tmp_path / "d")
    assert (settings.data.image_decoder, settings.data.num_workers) == ("pillow", 1)
    assert settings.training.train_steps == 20
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3, stderr="no disk"))
    with pytest.raises(UserError, match="ended with code 3: no disk"):
        bench_data.train(SimpleNamespace(root=tmp_path / "d"), "pillow", 1, 20, tmp_path)


def test_a_small_run_writes_its_table_and_its_figures(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    scene(320, 300).save(photos / "a.png")
    words = ["--sizes", "96x64", "--resolutions-px", "32", "--count", "6", "--batch", "2", "--batches", "2"]
    words += ["--workers", "0", "--step-s", "0.01", "--train-steps", "0", "--photos", str(photos)]
    words += ["--work", str(tmp_path / "w"), "--record", str(tmp_path / "t.md")]
    bench_data.main(words)
    (entry,) = json.loads((tmp_path / "t.json").read_text())
    assert entry["decode"][0]["image_px"] == "96x64"
    assert entry["decode"][0]["decoder"] == "pillow"
    assert entry["decode"][0]["images_per_s"] > 10
    assert 0 < entry["wait"][0]["waiting_frac"] < 1
    assert entry["loader"][0]["workers"] == 0
    assert "dali_mixed" in entry["not_run"]
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("# The data path\n")
    assert f"| 96x64 | 32 | pillow | {entry['decode'][0]['images_per_s']:.0f} (" in text
    assert "waiting, 0.01 s" in text
    assert "Training steps" not in text
    assert "tools/bench_data.py --sizes 96x64" in text
    assert "| 96x64 | 32 | pillow | 0 |" in capsys.readouterr().out
