"""tools/plan.py: the keys, the search, and bad arguments."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training import flops
from megatron_nucleus.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
STAGE_3 = str(ROOT / "examples/nucleus_image_17b/stage3_1024.yaml")
DEMO = str(ROOT / "examples/demo_cpu.yaml")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    return module


def run(tool, capsys, *arguments: str) -> tuple[dict, str]:
    tool.main([*arguments, "--json"])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_keys_and_the_arithmetic_between_them(tool, capsys):
    result, text = run(tool, capsys, "--config", STAGE_3, "--world-size", "64", "--device", "h200")
    shape = PRESETS["nucleus_image_17b"]
    assert result["parameters"] == count_parameters(shape) == 16_922_679_296
    assert result["active_parameters"] == flops.active_parameter_count(shape)
    assert result["forward_flops_per_image"] == sum(flops.forward_flops_per_image(shape, 4096, 128).values())
    memory = result["memory_bytes_per_rank"]
    assert list(memory) == ["weights", "gradients", "optimizer", "activations", "buffers", "total"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert memory["total"] == max(p["total"] for p in result["memory_bytes_per_rank_by_phase"].values())
    # One expert of 29 layers, a 64th of the rest, in fp32.
    assert memory["weights"] == pytest.approx(4 * (29 * 8_257_536 + 1_596_692_480 / 64), rel=1e-3)
    assert result["model_flops_per_step"] == 3 * 256 * result["forward_flops_per_image"]
    assert result["hardware_flops_per_step"] > result["model_flops_per_step"]
    work_s = result["model_flops_per_step"] / 64 / 989e12
    assert result["mfu"] == pytest.approx(work_s / result["step_s"])
    assert 0.05 < result["mfu"] < 0.7
    assert result["fsdp_bytes_per_rank_per_step"] == sum(result["fsdp_bytes_by_kind"].values())
    assert result["samples_per_s"] == pytest.approx(256 / result["step_s"])
    assert "64 x h200 on ib400: EP 64, micro-batch 4 x 1, recompute selective, bf16" in text


@pytest.mark.parametrize("stage", ["stage1_256", "stage2_512", "stage3_1024"])
def test_the_published_stages_fit_64_gpus_of_80_gb_with_room_to_spare(tool, capsys, stage):
    config = str(ROOT / f"examples/nucleus_image_17b/{stage}.yaml")
    result, _ = run(tool, capsys, "--config", config, "--world-size", "64")
    assert result["memory_bytes_per_rank"]["total"] <= 0.95 * result["usable_memory_bytes"]
    assert result["micro_batch_size"] * result["accumulation"] * 64 * (result["tokens"]) == 2**20


@pytest.mark.parametrize("stage", ["stage1_256", "stage2_512", "stage3_1024"])
def test_search_finds_what_fits(tool, capsys, stage):
    config = str(ROOT / f"examples/nucleus_image_17b/{stage}.yaml")
    start = time.perf_counter()
    result, text = run(tool, capsys, "--config", config, "--world-size", "64", "--search")
    assert time.perf_counter() - start < 20
    assert result["fits"]
    fits = [c for c in result["candidates"] if c["fits"]]
    assert result["step_s"] == fits[0]["step_s"] == min(c["step_s"] for c in fits)
    assert all(
        c["memory_bytes"] > result["usable_memory_bytes"] for c in result["candidates"] if not c["fits"]
    )
    assert {c["expert_model_parallel_size"] for c in result["candidates"]} == {1, 2, 4, 8, 16, 32, 64}
    if len(fits) < len(result["candidates"]):
        assert "too much; activations" in text


def test_what_the_plan_does_not_know_is_said(tool, capsys):
    flags = ("--config", STAGE_3, "--world-size", "64", "--modulated-layer-norm-backend", "torch")
    result, text = run(tool, capsys, *flags, "--moe-token-dispatcher-type", "deepep")
    assert len(result["notes"]) == 2
    assert (
        "note: deepep: memory by what our adapter allocates, without the library's own ElasticBuffer" in text
    )
    result, text = run(tool, capsys, *flags[:4])
    assert result["notes"] == []
    assert "note:" not in text


def test_a_small_gpu_needs_recomputation_and_no_gpu_at_all_says_so(tool, capsys):
    flags = ("--config", STAGE_3, "--world-size", "64", "--search", "--device")
    result, text = run(tool, capsys, *flags, "l4")
    assert result["recompute_granularity"] == "full" or result["micro_batch_size"] < 4
    assert "too much" in text
    result, text = run(tool, capsys, *flags, "l4", "--other-memory-gib", "20")
    assert not result["fits"]
    assert "0 of" in text
    assert "no setting fits" in text


def test_large_worlds_are_planned_in_seconds(tool, capsys):
    start = time.perf_counter()
    flags = ("--global-batch-size", "8192", "--resolution-px", "256", "--data-parallel-replicate-size", "8")
    result, _ = run(tool, capsys, "--config", STAGE_3, "--world-size", "4096", "--search", *flags)
    assert result["ranks"] == 4096
    assert result["fsdp_bytes_by_kind"]["all_reduce"] > 0
    assert time.perf_counter() - start < 20


def test_the_demo_on_one_rank(tool, capsys):
    result, _ = run(tool, capsys, "--config", DEMO, "--world-size", "1")
    assert result["all_to_all_bytes_per_rank_per_step"] == result["fsdp_bytes_per_rank_per_step"] == 0
    assert result["tokens"] == 16
    assert result["device"] == "h100"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world-size", "48"], "--expert-model-parallel-size 64: must divide the 48 ranks"),
        (["--world-size", "512", "--search"], "--global-batch-size 256: must be a multiple of the 512 ranks"),
        (["--world-size", "64", "--device", "h2000"], r"--device h2000: unknown \(did you mean h200\?\)"),
        (["--world-size", "64", "--network", "ib4000x"], "--network ib4000x: unknown"),
        (["--world-size", "0"], "--world-size 0: must be at least 1"),
        ([], "world_size .* is required"),
        (
            ["--world-size", "64", "--matmul-efficiency", "1.5"],
            r"--matmul-efficiency 1.5: must lie in \(0, 1\]",
        ),
        (["--world-size", "64", "--swiglu-backend", "extension"], "--swiglu-backend extension: not on cuda"),
        (["--world-size", "64", "--peak-tflops", "-5"], "--peak-tflops -5.0: must be a number > 0"),
        (["--world-size", "64", "--other-memory-gib", "nan"], "--other-memory-gib: expected a finite number"),
        (
            ["--world-size", "64", "--no-bf16", "--master-weights", "bf16"],
            "--master-weights bf16.*give --bf16",
        ),
        (["--world-size", "64", "--fp8", "torchao"], "--fp8 torchao: needs --fp8-recipe"),
        (
            ["--world-size", "64", "--fp8", "torchao", "--fp8-recipe", "rowwise", "--device", "a100"],
            "--fp8: A100 has no FP8 products",
        ),
        (["--world-size", "66", "--expert-model-parallel-size", "6"], "--expert-model-parallel-size 6"),
        (["--world-size", "64", "--grid", "4", "4"], "--num-experts 64: an image of 16 tokens"),
        (["--world-size", "64", "--serach"], r"unknown argument --serach \(did you mean --search\?\)"),
    ],
)
def test_bad_arguments(tool, flags, message):
    with pytest.raises(ConfigError, match=message):
        tool.main(["--config", STAGE_3, *flags])


def test_exit_code():
    command = [sys.executable, "tools/plan.py", "--config", STAGE_3, "--world-size", "48"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "stage1_256.yaml" in ended.stderr or "--expert-model-parallel-size 64" in ended.stderr
