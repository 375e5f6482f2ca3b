"""The training loop through its program: resume, accumulation, interruption, bad input."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from megatron_nucleus.export import native
from megatron_nucleus.training.metrics import KEYS
from megatron_nucleus.utils.errors import ConfigError, DataError, StoppedError
from tests.support import ROOT, tool
from tests.training.runs import assert_identical, rows, run_here, same_curve, tensors


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(config_file, tmp_path):
    run_here(config_file, tmp_path / "whole")
    run_here(config_file, tmp_path / "parts", "--train-steps", 3)
    run_here(config_file, tmp_path / "parts", "--train-steps", 6, "--num-workers", 1)
    assert_identical(tensors(tmp_path / "whole", 6), tensors(tmp_path / "parts", 6))
    same_curve(tmp_path / "whole", tmp_path / "parts")


def test_every_parameter_moves_and_metrics_are_complete(config_file, tmp_path):
    run_here(config_file, tmp_path / "run", "--save-interval", 1, "--train-steps", 4)
    first, last = (tensors(tmp_path / "run", s) for s in (1, 4))
    still = [n for n in first if n.startswith("model/") and torch.equal(first[n], last[n])]
    assert [n for n in still if "text_q_norm" not in n] == []
    curve = rows(tmp_path / "run")
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert all(set(KEYS) <= set(row) for row in curve)
    assert [row["samples_seen"] for row in curve] == [8, 16, 24, 32]
    assert curve[0]["lr"] == pytest.approx(1e-3)
    assert curve[1]["lr"] == curve[3]["lr"] == 2e-3
    assert all(
        row["loss"] == pytest.approx(row["flow_loss"] + 5e-7 * row["router_z_loss"], rel=1e-6)
        for row in curve
    )


def test_accumulation_equals_one_large_batch(config_file, tmp_path):
    """Same samples, noise and levels whatever the micro-batch: the mean over the global batch is the same."""
    run_here(config_file, tmp_path / "whole")
    run_here(config_file, tmp_path / "micro", "--micro-batch-size", 2)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "micro"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_loss_falls_on_a_small_set(config_file, tmp_path):
    run_here(config_file, tmp_path / "run", "--train-steps", 60, "--global-batch-size", 16, "--lr", 4e-3)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-20:]) / 20 < 0.88 * sum(losses[:10]) / 10


def test_adamw_runs_and_differs_from_muon(config_file, tmp_path):
    run_here(config_file, tmp_path / "a", "--optimizer", "adamw", "--train-steps", 3)
    run_here(config_file, tmp_path / "b", "--train-steps", 3)
    assert rows(tmp_path / "a")[0]["loss"] == rows(tmp_path / "b")[0]["loss"]
    assert rows(tmp_path / "a")[-1]["loss"] != rows(tmp_path / "b")[-1]["loss"]


def test_bf16_follows_fp32(config_file, tmp_path):
    run_here(config_file, tmp_path / "fp32", "--train-steps", 4)
    run_here(config_file, tmp_path / "bf16", "--train-steps", 4, "--bf16")
    for a, b in zip(rows(tmp_path / "fp32"), rows(tmp_path / "bf16"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert all(
        t.dtype == torch.float32 for t in tensors(tmp_path / "bf16", 4).values() if t.is_floating_point()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_exits_with_4_and_the_same_command_finishes(config_file, tmp_path, number):
    command = [
        sys.executable, str(ROOT / "tools/train.py"), "--config", str(config_file), "--run-dir", str(tmp_path / "run"),
        "--train-steps", "40",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "the same command resumes it" in err.strip().splitlines()[-1]
    if number != signal.SIGTERM:
        return
    run_here(config_file, tmp_path / "whole", "--train-steps", 40)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_identical(tensors(tmp_path / "whole", 40), tensors(tmp_path / "run", 40))
    same_curve(tmp_path / "whole", tmp_path / "run")


def test_time_limit_stops_with_a_checkpoint(config_file, tmp_path):
    with pytest.raises(StoppedError, match="exit-duration-in-mins: saved step 1"):
        run_here(config_file, tmp_path / "run", "--exit-duration-in-mins", 1e-9)
    assert run_here(config_file, tmp_path / "run").state.step == 6


def test_steps_without_a_finite_gradient_are_skipped_and_finally_stop_the_run(
    config_file, tmp_path, monkeypatch
):
    from megatron_nucleus.training import step

    good = step.flow_loss_per_image
    calls = {"n": 0}

    def poisoned(velocity, target):
        calls["n"] += 1
        loss = good(velocity, target)
        return loss * math.nan if calls["n"] in (2, 3) or calls["n"] > 5 else loss

    monkeypatch.setattr(step, "flow_loss_per_image", poisoned)
    result = run_here(config_file, tmp_path / "run", "--train-steps", 4, "--save-interval", 1)
    assert result.state.skipped == 2
    assert_identical(
        {k: v for k, v in tensors(tmp_path / "run", 1).items() if k.startswith("model/")},
        {k: v for k, v in tensors(tmp_path / "run", 3).items() if k.startswith("model/")},
    )
    assert [row["loss"] for row in rows(tmp_path / "run")][1:3] == [None, None]
    with pytest.raises(StoppedError, match="3 steps in a row"):
        run_here(config_file, tmp_path / "run", "--train-steps", 20, "--max-skipped-in-a-row", 3)


def test_program_prints_the_promised_json(config_file, tmp_path):
    out = tool("train", "--config", config_file, "--run-dir", tmp_path / "run", "--json", "--sample-interval", 6,
               "--sample-prompts", "a photo of a red circle", "a photo of two squares")  # fmt: skip
    result = json.loads(out.stdout.strip().splitlines()[-1])
    assert result["steps"] == 6
    assert result["samples_seen"] == 48
    assert result["loss"] == rows(tmp_path / "run")[-1]["loss"]
    from PIL import Image

    with Image.open(tmp_path / "run" / "samples" / "step_00000006.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 50
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}
    again = tool(
        "train", "--config", config_file, "--run-dir", tmp_path / "run", "--json"
    )  # finished: exit 0
    assert json.loads(again.stdout.strip().splitlines()[-1]) == result
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")} == files
    with pytest.raises(ConfigError, match="--train-steps 5: the run .* is already at step 6"):
        run_here(config_file, tmp_path / "run", "--train-steps", 5)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run_here(config_file, tmp_path / "run").loss is None


def test_changed_run_is_refused(config_file, tmp_path, corpus):
    run_here(config_file, tmp_path / "run", "--train-steps", 1)
    with pytest.raises(ConfigError, match=r"training.seed = 0, now it is 5"):
        run_here(config_file, tmp_path / "run", "--seed", 5)
    with pytest.raises(ConfigError, match=r"model.num_experts = 4, now it is 2"):
        run_here(config_file, tmp_path / "run", "--num-experts", 2)
    tool("make_scenes", "--output", tmp_path / "raw", "--count", 16, "--seed", 9)
    tool(
        "curate",
        "--input",
        tmp_path / "raw",
        "--output",
        tmp_path / "other",
        "--config",
        "examples/scenes/curate.yaml",
        "--workers",
        1,
    )
    with pytest.raises(ConfigError, match="sample order would change"):
        run_here(config_file, tmp_path / "run", "--data-path", tmp_path / "other")
    assert run_here(config_file, tmp_path / "run", "--train-steps", 2).state.step == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-steps", 0], "--train-steps 0: must be at least 1"),
        (["--micro-batch-size", 3], "--micro-batch-size 3 does not divide --global-batch-size 8"),
        (["--expert-model-parallel-size", 2], "--expert-model-parallel-size 2"),
        (["--resolution-px", 20], "20"),
        (["--data-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--attention-backend", "flash"], "flash"),
        (["--sample-interval", 5], "--sample-prompts"),
        (["--lr", -1], "lr"),
        (["--capacity-factors", 100], "capacity_factors"),
        (["--seed", 2**63], f"--seed {2**63}: must be a signed 64-bit number"),
        (["--seed", -(2**63) - 1], "signed 64-bit"),
        (["--latent-channels", 8], "--latent-channels 8: the codec 'dct' gives 16"),
        (["--steps", 0], "--steps 0"),
        (["--shift", 0], "--shift 0"),
        (["--guidance", "nan"], "--guidance: expected a finite number"),
        (["--height", 33], "--height 33: must be a multiple of 8 px"),
        (["--width", 0], "--width 0"),
        (["--sample-interval", 5, "--sample-prompts", "red", "a " * 200], "--sample-prompts: number 1"),
    ],
)
def test_bad_settings_are_named_before_anything_is_built(config_file, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        run_here(config_file, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_largest_seeds_train(config_file, tmp_path, seed):
    assert run_here(config_file, tmp_path / "run", "--seed", seed, "--train-steps", 1).loss > 0


def test_a_last_loss_that_is_not_finite_is_null(config_file, tmp_path, monkeypatch, capsys):
    from megatron_nucleus.training import step

    def bad(velocity, target):
        return velocity.sum((1, 2)) * math.nan

    monkeypatch.setattr(step, "flow_loss_per_image", bad)
    flags = ["--config", str(config_file), "--run-dir", str(tmp_path / "run"), "--train-steps", "1", "--json"]
    runpy.run_path(str(ROOT / "tools" / "train.py"))["main"](flags)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["loss"], printed["steps"], printed["skipped"]) == (None, 1, 1)
    assert run_here(config_file, tmp_path / "run", "--train-steps", 1).loss is None


def test_a_preview_that_fails_comes_after_its_checkpoint(config_file, tmp_path, monkeypatch):
    from megatron_nucleus.training.training import Loop

    def fail(self):
        raise RuntimeError("no picture")

    monkeypatch.setattr(Loop, "preview", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        run_here(config_file, tmp_path / "run", "--sample-interval", 3, "--sample-prompts", "a red circle")
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"


def test_a_refused_start_leaves_the_saved_configuration_alone(config_file, tmp_path, corpus):
    run_here(config_file, tmp_path / "run", "--train-steps", 2)
    saved = (tmp_path / "run" / "config.yaml").read_bytes()
    for flags in (["--train-steps", 1], ["--optimizer", "adamw"], ["--data-path", "/nowhere"]):
        with pytest.raises(ConfigError):
            run_here(config_file, tmp_path / "run", *flags)
        assert (tmp_path / "run" / "config.yaml").read_bytes() == saved
    run_here(config_file, tmp_path / "run", "--train-steps", 3, "--lr", 0.5)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"]["optimizer"]["lr"] == 0.5


def test_a_second_trainer_on_the_same_folder_is_refused(config_file, tmp_path):
    command = [sys.executable, str(ROOT / "tools/train.py"), "--config", str(config_file), "--run-dir",
               str(tmp_path / "run"), "--train-steps", "100000", "--num-workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(ConfigError, match=rf"--run-dir {tmp_path / 'run'}: another process"):
            run_here(config_file, tmp_path / "run", "--train-steps", 100000)
    finally:
        process.kill()
        process.wait(timeout=30)
    left_by_the_killed = native.step_number(native.resolve_checkpoint(tmp_path / "run"))
    steps = left_by_the_killed + 1
    assert run_here(config_file, tmp_path / "run", "--train-steps", steps).state.step == steps


def test_exit_codes_and_one_line_errors(config_file, tmp_path):
    bad_flag = tool("train", "--config", config_file, "--learning-rate", 1, check=False)
    assert bad_flag.returncode == 2
    assert len(bad_flag.stderr.strip().splitlines()) == 1
    assert "unknown argument --learning-rate" in bad_flag.stderr
    run_here(config_file, tmp_path / "run", "--train-steps", 3)
    victim = next((tmp_path / "run/checkpoints/step_00000003/model").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-10])
    damaged = tool("train", "--config", config_file, "--run-dir", tmp_path / "run", check=False)
    assert damaged.returncode == 3
    assert victim.name in damaged.stderr.strip().splitlines()[-1]
    for text in ("config: [", "config: 5", "config: [1]", "config: {model: 3}", "config:", "7", ""):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml is damaged"):
            run_here(config_file, tmp_path / "run")
        assert (tmp_path / "run" / "config.yaml").read_text() == text


def test_a_run_says_how_its_images_fit_their_buckets(config_file, corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(config_file, tmp_path / "run", "--train-steps", 1)
    (row,) = json.loads((tmp_path / "run" / "buckets.json").read_text())
    assert (row["bucket"], row["images"], row["tokens"], row["batch_samples"]) == ("1024x1024", 128, 16, 8)
    assert (row["width_px"], row["height_px"], row["cropped_max_frac"], row["enlarged"]) == (32, 32, 0.0, 0)
    assert "how the images fit their buckets" in caplog.text
    assert "1024x1024" in caplog.text
