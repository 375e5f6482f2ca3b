"""tools/merge_checkpoints.py as a program."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export import hf_keys, native
from megatron_nucleus.export.convert import write_native_files
from megatron_nucleus.export.load import load_model
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.safetensors_stream import SafetensorsStream
from megatron_nucleus.utils.errors import ConfigError

TOOL = Path(__file__).parents[2] / "tools" / "merge_checkpoints.py"


@pytest.fixture
def tool():
    """`main` of a program in tools/, by name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_program", TOOL.with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


def write_run(run, steps, layers=1, heads=1, hidden=16):
    """Checkpoints whose every value is the step's number."""
    shape = ModelShape(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=16, num_key_value_heads=1, text_dim=24,
        latent_channels=4, patch_size=2, axes_dims_rope=(4, 6, 6), mlp_ratio=4.0, dense_moe_strategy="all_moe",
        num_experts=16, moe_intermediate_dim=hidden, capacity_factors=(2.0,) * layers, use_sigmoid=False,
        route_scale=2.5,
    )  # fmt: skip
    entries = {key.native: TensorInfo(key.shape, torch.float32) for key in hf_keys.keys(shape)}
    for step in steps:
        folder = run / "checkpoints" / native.step_name(step)
        (folder / "model").mkdir(parents=True)
        with SafetensorsStream(folder / "model", "model", entries) as stream:
            for name in stream.order:
                stream.write(name, torch.full(entries[name].shape, float(step)))
        state = {"format": 1, "step": step, "model": native.shape_to_dict(shape)}
        write_native_files(folder, state, stream.files)
        native.set_latest(folder.parent, folder)


def run_tool(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_memory_and_values_of_a_merge(tmp_path):
    write_run(tmp_path / "small", (1, 2, 3, 4))
    write_run(tmp_path / "large", (2, 3, 4), layers=2, heads=16, hidden=512)
    reports = {}
    for name in ("small", "large"):
        out = tmp_path / f"{name}_merged"
        result = run_tool(
            "--checkpoints",
            tmp_path / name,
            "--last",
            3,
            "--weights",
            "inverse_sqrt",
            "--output",
            out,
            "--json",
        )
        assert (result.returncode, result.stderr) == (0, "")
        reports[name] = json.loads(result.stdout.splitlines()[-1])
    report = reports["large"]
    raw = [1 / math.sqrt(k) for k in (3, 2, 1)]
    assert report["weights"] == pytest.approx([w / sum(raw) for w in raw], rel=1e-12)
    assert report["inputs"] == [
        str(tmp_path / "large" / "checkpoints" / native.step_name(s)) for s in (2, 3, 4)
    ]
    value = sum(w * s for w, s in zip(report["weights"], (2, 3, 4), strict=True))
    merged = load_model(tmp_path / "small_merged")
    assert all(bool((p == torch.tensor(value)).all()) for p in merged.parameters())
    growth = report["peak_memory_bytes"] - reports["small"]["peak_memory_bytes"]
    assert growth < 2 * report["largest_tensor_bytes"]
    assert growth < report["bytes"]  # three inputs and an output of this size


def test_too_few_checkpoints_exit_with_2(tmp_path):
    write_run(tmp_path / "run", (1, 2))
    result = run_tool("--checkpoints", tmp_path / "run", "--last", 16, "--output", tmp_path / "m")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "--last 16: only 2 checkpoints exist" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--last", "1", "--weights", "uniform", "--ema-decay", "0.5"],
            "--ema-decay 0.5: only with --weights ema",
        ),
        (["--last", "1", "--weights", "ema", "--ema-decay", "1"], "--ema-decay 1.0: must lie between"),
        (["--last", "1", "--weights", "cosin"], "cosin"),
        (["--last", "2", "--weights", "custom"], "exactly one of --weight-values and --decay-multipliers"),
        (["--last", "2", "--weights", "custom", "--weight-values", "1"], "--weight-values 1: 1 values for 2"),
        (["--last", "2", "--weights", "custom", "--weight-values", "nan", "1"], "nan is not allowed"),
        (["--last", "1", "--until", "3"], "--until 3: no such checkpoint; there are 1, 2"),
        (["--steps", "1", "--until", "1"], "--until 1: only with --last N"),
        (["--last", "two"], "two"),
        ([], "exactly one of --last N and --steps"),
        (["--last", "1", "--steps", "1"], "exactly one"),
        (["--lats", "1"], "did you mean --last"),
    ],
)
def test_bad_flags(tool, tmp_path, arguments, message):
    write_run(tmp_path / "run", (1, 2))
    with pytest.raises(ConfigError, match=message):
        tool("merge_checkpoints")(
            ["--checkpoints", str(tmp_path / "run"), "--output", str(tmp_path / "m"), *arguments]
        )
    assert not (tmp_path / "m").exists()


def test_in_process_run_with_steps(tool, tmp_path, capsys):
    write_run(tmp_path / "run", (1, 2, 3))
    tool("merge_checkpoints")(
        ["--checkpoints", str(tmp_path / "run" / "checkpoints"), "--steps", "3", "1", "--weights", "ema",
         "--ema-decay", "0.25", "--output", str(tmp_path / "m"), "--json"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weight", "rate", "checkpoint"]
    assert lines[1].startswith("0.200000  1.000000  ")
    assert lines[2].startswith("0.800000  0.800000  ")
    report = json.loads(lines[-1])
    assert report["weights"] == pytest.approx([0.2, 0.8])
    assert report["decay_multipliers"] == pytest.approx([1.0, 0.8])
    assert load_model(tmp_path / "m").image_in.bias[0].item() == pytest.approx(2.6)


def test_a_window_in_the_middle_and_weights_of_ones_own(tool, tmp_path, capsys):
    write_run(tmp_path / "run", (1, 2, 3, 10))

    def merged(name, *arguments):
        tool("merge_checkpoints")(
            ["--checkpoints", str(tmp_path / "run"), "--last", "3", "--until", "3", "--weights", "custom",
             *arguments, "--output", str(tmp_path / name), "--json"]
        )  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        report = json.loads(lines[-1])
        assert [Path(p).name for p in report["inputs"]] == [native.step_name(s) for s in (1, 2, 3)]
        return load_model(tmp_path / name).image_in.bias[0].item(), report, lines

    value, report, lines = merged("a", "--weight-values", "1", "1", "2")
    assert value == pytest.approx((1 + 2 + 2 * 3) / 4)
    assert "--weight-values sum to 4; each was divided by it" in lines
    assert report["decay_multipliers"] == [1.0, 0.75, 0.5]
    again, report, lines = merged("b", "--decay-multipliers", "1", "0.75", "0.5")
    assert again == value
    assert report["weights"] == [0.25, 0.25, 0.5]
    assert not any("divided" in line for line in lines)
