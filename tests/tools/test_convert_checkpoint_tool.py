"""tools/convert_checkpoint.py as a program: exit codes, the JSON line, and memory that does not grow with the model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export import hf_keys
from megatron_nucleus.export.load import load_model
from megatron_nucleus.utils.errors import ConfigError

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def run_tool(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def tool():
    """`main` of a program in tools/, by name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_program", TOOL.with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    return load


def write_diffusers(folder, layers, width_heads=16, hidden=512):
    """A sharded diffusers folder with random values, one file per tensor."""
    shape = ModelShape(
        num_layers=layers, num_attention_heads=width_heads, attention_head_dim=16, num_key_value_heads=1, text_dim=24,
        latent_channels=4, patch_size=2, axes_dims_rope=(4, 6, 6), mlp_ratio=4.0, dense_moe_strategy="all_moe",
        num_experts=16, moe_intermediate_dim=hidden, capacity_factors=(2.0,) * layers, use_sigmoid=False,
        route_scale=2.5,
    )  # fmt: skip
    folder.mkdir()
    torch.manual_seed(0)
    weight_map = {}
    for i, key in enumerate(hf_keys.keys(shape)):
        file = f"diffusion_pytorch_model-{i:05d}.safetensors"
        save_file({key.diffusers: torch.rand(key.shape)}, folder / file)
        weight_map[key.diffusers] = file
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_keys.to_diffusers_config(shape)))
    return shape


def test_memory_stays_near_the_largest_tensor(tmp_path):
    write_diffusers(tmp_path / "small", layers=1, width_heads=1, hidden=16)
    write_diffusers(tmp_path / "large", layers=5)
    reports = {}
    for name, to in (("small", "native"), ("large", "native"), ("native", "hf")):
        source = tmp_path / name
        target = tmp_path / ("native" if name == "large" else f"{name}_out")
        result = run_tool("--input", source, "--output", target, "--to", to, "--json")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        reports[name] = json.loads(result.stdout.splitlines()[-1])
    large = reports["large"]
    assert large["parameters"] * 4 == large["bytes"] > 7 * large["largest_tensor_bytes"]
    assert large["largest_tensor_bytes"] == 16 * 256 * 1024 * 4
    assert large["wall_s"] > 0
    for name in ("large", "native"):
        assert reports[name]["tensors"] == large["tensors"]
        growth = reports[name]["peak_memory_bytes"] - reports["small"]["peak_memory_bytes"]
        assert growth < 1.5 * large["largest_tensor_bytes"]
        assert growth < large["bytes"] / 3


def test_command_line_errors_are_one_line(tmp_path):
    write_diffusers(tmp_path / "hf", layers=1, width_heads=1, hidden=16)
    result = run_tool("--input", tmp_path / "gone", "--output", tmp_path / "out", "--to", "native")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: checkpoint ")
    assert "gone: no such folder" in result.stderr
    (tmp_path / "hf" / "diffusion_pytorch_model-00003.safetensors").unlink()
    result = run_tool("--input", tmp_path / "hf", "--output", tmp_path / "out", "--to", "native")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (3, "", 1)
    assert "diffusion_pytorch_model-00003.safetensors: missing" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "a", "--output", "b", "--to", "onnx"], "onnx"),
        (["--input", "a", "--output", "b"], "--to"),
        (
            ["--input", "a", "--output", "b", "--to", "hf", "--max-shard-sizes", "1GB"],
            "did you mean --max-shard-size",
        ),
        (["--input", "a", "--output", "b", "--to", "hf", "--max-shard-size", "big"], "--max-shard-size big"),
        (["--input", "a", "--output", "b", "--to", "hf", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_flags(tool, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tool("convert_checkpoint")(arguments)


def test_in_process_run_prints_what_it_did(tool, tmp_path, capsys):
    shape = write_diffusers(tmp_path / "hf", layers=1, width_heads=1, hidden=16)
    out = tmp_path / "native"
    tool("convert_checkpoint")(
        ["--input", str(tmp_path / "hf"), "--output", str(out), "--to", "native", "--max-shard-size", "20KB",
         "--dtype", "bfloat16", "--json"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["parameters"] == hf_keys.count_parameters(shape)
    assert report["bytes"] == 2 * report["parameters"]
    assert report["shards"] == len(list((out / "model").glob("*.safetensors"))) > 1
    assert f"{report['parameters']:,} parameters" in lines[0]
    assert {p.dtype for p in load_model(out).parameters()} == {torch.bfloat16}
