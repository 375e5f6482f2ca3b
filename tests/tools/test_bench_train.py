"""tools/bench_train.py: the keys, the arithmetic between them, the comparison, and bad arguments."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelConfig, resolve_shape
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig
from megatron_nucleus.core.parallel_state import single_process
from megatron_nucleus.training.benchmark import compare as benchmark_compare
from megatron_nucleus.training.benchmark.benchmark import (
    BenchConfig,
    flops,
    make_workload,
    randomise_zeros,
    run_benchmark,
)
from megatron_nucleus.training.benchmark.parts import Timed, call_ours, interleave, spread
from megatron_nucleus.training.profiling.regions import REGIONS, STEP_PARTS
from megatron_nucleus.utils.errors import ConfigError

PROGRAM = Path(__file__).parents[2] / "tools" / "bench_train.py"
SMALL = ["--num-layers", "2", "--num-experts", "4", "--capacity-factors", "2", "--global-batch-size", "4"]
FAST = [*SMALL, "--grid", "2", "3", "--text-tokens", "5", "--steps", "2", "--warmup", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_train", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_train"] = module
    spec.loader.exec_module(module)
    return module


def run(tool, capsys, *arguments: str) -> dict:
    tool.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def small_shape():
    return resolve_shape(ModelConfig(num_layers=2, num_experts=4, capacity_factors=(2.0,)))


def run_alone(model, bench, work) -> dict:
    alone = single_process(torch.device("cpu"), model.shape.num_experts)
    return run_benchmark(model, bench, OptimizerConfig(), work, None, alone)


def test_step_has_all_parts_and_consistent_figures(tool, capsys):
    result = run(tool, capsys, *FAST, "--micro-batch-size", "2", "--peak-tflops", "0.5")
    parts = [result[name]["median_s"] for name in ("accumulation", "forward_backward", "optimizer")]
    assert result["step_s"] == pytest.approx(sum(parts))  # two micro-batches
    assert result["samples_per_step"] == 4
    assert result["samples_per_s"] == pytest.approx(4 / result["step_s"])
    expected = 4 * flops.training_flops_per_image(small_shape(), tokens=6, text_tokens=5)
    assert result["model_flops_per_step"] == expected
    assert result["mfu"] == pytest.approx(expected / result["step_s"] / 0.5e12)
    assert result["backends"]["attention"] == "torch"
    assert {"expert_ffn", "norm_rope", "swiglu"} < set(result["backends"])
    assert (result["peak_tflops"], result["peak_source"]) == (0.5, "--peak-tflops")
    assert result["step"] == "forward_backward+optimizer"
    assert result["forward"]["repeats"] == 2
    assert 50e6 < result["peak_memory_bytes"] < 64e9
    assert "compare" not in result
    assert result["ranks"] == 1
    assert result["dense_grid"] == {"replicate": 1, "shard": 1}
    assert result["all_to_all_bytes_per_rank_per_step"] == result["all_to_all_bytes_theory"] == 0
    assert result["muon_bytes_per_rank_per_step"] == {"gather": 0, "return": 0, "replicate": 0}


def test_breakdown_is_of_the_whole_step(tool, capsys):
    result = run(tool, capsys, *FAST, "--micro-batch-size", "2", "--steps", "1")
    times = {name: t["median_s"] for name, t in result["breakdown"].items()}
    assert set(times) == {"step", *STEP_PARTS, "other", *REGIONS, "dispatch_combine"}
    assert sum(times[part] for part in (*STEP_PARTS, "other")) == pytest.approx(times["step"])
    assert min(times.values()) > 0
    assert "breakdown" not in run(tool, capsys, *FAST, "--no-breakdown")


def test_a_named_backend_is_that_of_the_row(tool, capsys):
    flags = ("--swiglu-backend", "torch", "--no-breakdown", "--steps", "1", "--warmup", "0")
    assert run(tool, capsys, *FAST, *flags)["backends"]["swiglu"] == "torch"


def test_recorded_rows(tool, capsys, tmp_path):
    path = tmp_path / "train.md"
    for _ in range(2):  # the second takes the place of the first
        result = run(tool, capsys, *FAST, "--record", str(path))
    (entry,) = json.loads(path.with_suffix(".json").read_text())
    assert entry["result"] == result
    assert entry["command"] == "tools/bench_train.py " + " ".join(FAST)
    (row,) = [line for line in path.read_text().splitlines() if line.startswith("| 1 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{result['step_s'] * 1e3:.2f} ms"
    assert cells[8] == f"{result['breakdown']['dispatch_combine']['median_s'] * 1e3:.2f} ms"
    assert cells[12:14] == ["fp32", str(torch.get_num_threads())]
    assert len(cells) == 18


def test_data_of_the_breakdown_can_be_read(tool, capsys, monkeypatch):
    """Loader and encoders stand in the data part; what they cost is shown there and nowhere else."""
    calls = []

    @contextlib.contextmanager
    def reading(run, parallel):
        calls.append(str(run.data.data_path))
        yield lambda: time.sleep(0.05)

    monkeypatch.setattr(tool, "reading_data", reading)
    result = run(
        tool, capsys, *FAST, "--read-data", "--data-path", "somewhere", "--steps", "1", "--warmup", "0"
    )
    assert calls == ["somewhere"]
    assert 0.05 <= result["breakdown"]["data"]["median_s"] < result["breakdown"]["step"]["median_s"]


def test_unknown_peak_means_no_mfu(tool, capsys):
    result = run(tool, capsys, *FAST, "--forward-only")
    assert result["mfu"] is None
    assert result["step"] == "forward"
    assert result["model_flops_per_step"] * 3 == 4 * flops.training_flops_per_image(small_shape(), 6, 5)
    assert "forward_backward" not in result
    assert "optimizer" not in result


def test_comparison_is_with_the_faster_of_their_paths(tool, capsys):
    pytest.importorskip("diffusers")
    result = run(tool, capsys, *FAST, "--compare", "diffusers")
    compare = result["compare"]
    assert compare["name"] == "diffusers"
    assert result["step"] == "forward_backward", "their module has no optimizer, so neither step has one"
    assert compare["ratio"] == pytest.approx(compare["step_s"] / result["step_s"])
    settings = {"compiled_too": False, "checkpointing": False, "weights_dtype": "float32"}
    assert compare["settings"].items() >= settings.items()
    assert compare["settings"]["version"]
    for part in ("forward", "forward_backward"):
        assert set(compare[part]["all_paths_s"]) == {"loop", "grouped_mm"}
        assert compare[part]["median_s"] == min(compare[part]["all_paths_s"].values())
        assert compare[part]["ratio"] == pytest.approx(compare[part]["median_s"] / result[part]["median_s"])


def test_their_best_settings_are_timed_too(tool, capsys, monkeypatch):
    """Compiled and with checkpointing; a path that torch cannot compile is said and left out, not the comparison."""
    pytest.importorskip("diffusers")
    graphs = []

    def backend(graph, inputs):
        if any("grouped_mm" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no\n grouped_mm")
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(benchmark_compare, "COMPILE_BACKEND", backend)
    flags = (
        "--compare", "diffusers", "--compare-compile", "--compare-checkpointing", "--recompute-granularity", "full",
        "--steps", "1",
    )  # fmt: skip
    compare = run(tool, capsys, *FAST, *flags)["compare"]
    variants = {"loop+checkpointing", "grouped_mm+checkpointing", "loop+compiled+checkpointing"}
    for part in ("forward", "forward_backward"):
        assert set(compare[part]["all_paths_s"]) == variants
        assert compare[part]["expert_path"] in variants
    assert graphs
    (refused,) = compare["refused"]
    assert refused == "grouped_mm+compiled+checkpointing"

    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(benchmark_compare, "COMPILE_BACKEND", broken)
    with pytest.raises(ConfigError, match="--compare-compile: torch cannot compile"):
        tool.main([*FAST, *flags])


def test_their_checkpointing_keeps_their_function(monkeypatch):
    """Gradients with it are those without it, and it runs the blocks again."""
    pytest.importorskip("diffusers")
    bench, shape = BenchConfig(compare="diffusers", text_tokens=4), small_shape()
    work = make_workload(
        shape, bench, (2, 3), micro_batch_size=2, accumulation=1, bf16=False, device=torch.device("cpu")
    )
    model = NucleusTransformer(shape)
    randomise_zeros(model)
    gradients, runs = [], []
    for checkpointing, variant in ((False, "loop"), (True, "loop+checkpointing")):
        parts, _ = benchmark_compare.diffusers_parts(model, work, False, checkpointing=checkpointing)
        name = f"theirs/{variant}/forward_backward"
        timed = parts[name].__self__
        begun: list[int] = []
        timed.module.transformer_blocks[0].register_forward_pre_hook(lambda *_, begun=begun: begun.append(1))
        parts[name]()
        runs.append(len(begun))
        gradients.append([p.grad.clone() for p in timed.module.parameters() if p.grad is not None])
    assert runs == [1, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bf16", [False, True])
def test_comparison_refuses_another_function(bf16, monkeypatch):
    """The two modules share one set of weights; a mapping that swaps two of them must not go unnoticed."""
    pytest.importorskip("diffusers")
    bench = BenchConfig(steps=1, warmup=0, compare="diffusers", text_tokens=4)
    shape = small_shape()
    work = make_workload(
        shape, bench, (2, 3), micro_batch_size=2, accumulation=1, bf16=bf16, device=torch.device("cpu")
    )
    result = run_alone(NucleusTransformer(shape), bench, work)
    assert result["compare"]["step_s"] > 0
    right = benchmark_compare.to_diffusers_state

    def wrong(state, shape):
        out = right(state, shape)
        a, b = (f"transformer_blocks.1.attn.to_{x}.weight" for x in "kv")
        return out | {a: out[b], b: out[a]}

    monkeypatch.setattr(benchmark_compare, "to_diffusers_state", wrong)
    with pytest.raises(RuntimeError, match="computes something else"):
        run_alone(NucleusTransformer(shape), bench, work)


def test_configuration_file_of_a_training_run(tool, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {preset: demo, num_layers: 2, num_experts: 4, capacity_factors: [2]}\n"
        "training: {global_batch_size: 6, micro_batch_size: 3, train_steps: 9}\n"
        "data: {resolution_px: 16}\n"
        "flow: {sigma_std: 1.5}\n"
        "optimizer: {optimizer: adamw}\n"
    )
    result = run(tool, capsys, "--config", str(path), "--steps", "1", "--warmup", "0")
    assert result["samples_per_step"] == 6
    assert result["tokens"] == 4  # 16 px, stride 4, patch 2
    path.write_text("model: {preset: demo, num_layer: 2}\n")
    with pytest.raises(ConfigError, match=r"model\.num_layer.*num_layers"):
        tool.main(["--config", str(path)])
    path.write_text("modle: {}\n")
    with pytest.raises(ConfigError, match="modle.*did you mean model"):
        tool.main(["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "4"], "--grid 4"),
        (["--grid", "0", "4"], "--grid 0 4"),
        (["--steps", "0"], "--steps 0"),
        (["--text-tokens", "0"], "--text-tokens 0"),
        (["--compare", "megatron"], "diffusers"),
        (["--compare", "diffusers", "--time-optimizer"], "--time-optimizer"),
        (["--compare-compile"], "--compare-compile: needs --compare diffusers"),
        (["--compare-checkpointing"], "--compare-checkpointing: needs --compare diffusers"),
        (["--breakdown", "--forward-only"], "--breakdown does not go with --forward-only"),
        (["--read-data", "--no-breakdown"], "--read-data"),
        (
            ["--compare", "diffusers", "--fp8", "emulated", "--fp8-recipe", "rowwise"],
            "--compare diffusers: .*leave out --fp8 emulated",
        ),
        (["--compare", "diffusers", "--compile-blocks"], "--compare diffusers: .*add --compare-compile"),
        (
            ["--compare", "diffusers", "--compare-checkpointing"],
            "--compare diffusers: .*add --recompute-granularity full",
        ),
        (["--record", "nowhere/t.md"], "--record nowhere/t.md"),
        (["--resolution-px", "60"], "multiple of 8"),
        (["--preset", "dmeo"], "did you mean demo"),
        (["--micro-batch-size", "3", "--global-batch-size", "4"], "does not divide"),
        (["--capacity-factors", "9"], "capacity_factors"),
        (["--stepz", "3"], "did you mean --steps"),
        (["--expert-model-parallel-size", "2"], "--expert-model-parallel-size 2"),
    ],
)
def test_bad_arguments_are_named(tool, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)


def test_comparison_is_for_one_process(tool, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--compare diffusers.*not on 2 ranks"):
        tool.main([*FAST, "--compare", "diffusers"])


def test_program_prints_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--preset", "dmeo"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_parts_take_turns_and_warm_up_is_not_timed():
    calls = []
    parts = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = interleave(parts, repeats=3, warmup=1, device=torch.device("cpu"))
    assert "".join(calls) == "abbaabba"
    assert times["a"].repeats == times["b"].repeats == 3


def test_spread():
    result = spread([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (result.median_s, result.p25_s, result.p75_s, result.min_s) == (3.0, 2.0, 4.0, 1.0)
    assert spread([2.0]).p75_s == 2.0


def test_bf16_training_keeps_fp32_weights():
    shape = small_shape()
    bench = BenchConfig(steps=3, warmup=0, text_tokens=4)
    work = make_workload(
        shape, bench, (2, 2), micro_batch_size=2, accumulation=1, bf16=True, device=torch.device("cpu")
    )
    model = NucleusTransformer(shape)
    run_alone(model, bench, work)
    assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in model.parameters())


def test_gradients_of_later_micro_batches_are_added_to_those_of_the_first():
    """A step's work for every micro-batch but one holds the adding, as in training."""
    shape, bench = small_shape(), BenchConfig(text_tokens=4)
    work = make_workload(
        shape, bench, (2, 2), micro_batch_size=2, accumulation=3, bf16=False, device=torch.device("cpu")
    )
    model = NucleusTransformer(shape)
    randomise_zeros(model)
    timed = Timed(model, lambda: call_ours(model, work), work)
    timed.forward_backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    timed.forward_backward(first=False)
    assert len(once) > 30
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient, msg=name)
    timed.forward_backward()
    assert all(torch.equal(model.get_parameter(name).grad, g) for name, g in once.items())


@pytest.mark.parametrize("flags", [(), ("--recompute-granularity", "full"), ("--forward-only",)])
def test_hardware_flops_are_those_of_the_timed_step(tool, capsys, flags):
    """By hand, product by product, of a step of 2 x 2 images, 6 image and 5 text tokens."""
    result = run(tool, capsys, *FAST, "--micro-batch-size", "2", "--no-breakdown", "--steps", "1", *flags)
    shape = small_shape()
    D, H, F, E, U, kv = 128, shape.dense_hidden, 128, 4, shape.text_dim, 2 * 2 * 32
    assert (shape.width, shape.moe_intermediate_dim, 2 * shape.num_key_value_heads * 32) == (D, F, kv)
    B, S, L, P, rows = (
        2,
        6,
        5,
        shape.patch_channels,
        4 * 3,
    )  # each of 4 experts takes ceil(2 * 6 / 4) of 6 tokens
    image_in, time_1, time_2 = B * S * P * D, B * D * 4 * D, B * 4 * D * D
    head = B * S * D * P + B * D * 2 * D
    tokens = B * S * (2 * D * D + D * kv)  # q and out, k and v together
    modulation, scores = B * D * 4 * D, 2 * B * S * (S + L) * D
    hidden, projected = B * L * U * D, B * L * D * kv  # text, one matrix behind the other at so few tokens
    dense = B * S * 3 * D * H
    moe = (B + B * S) * D * E + B * S * 3 * D * F + B * rows * 3 * D * F
    once = 2 * (modulation + tokens + scores + hidden + projected) + dense + moe  # both blocks
    forward = 2 * 2 * (image_in + time_1 + time_2 + head + once)  # two micro-batches, a multiply-add is two
    if flags == ("--forward-only",):
        assert result["hardware_flops_per_step"] == forward
        return
    # Backward: twice, but once for what has an input without a gradient; five products for attention's two.
    back = 2 * (once + time_2 + head) + image_in + time_1 + 2 * (scores // 2 - hidden)
    recompute = once if flags else 0
    muon = [(D, D)] * 4 + [(64, D)] * 8 + [tuple(sorted((U, D)))] * 2
    muon += [tuple(sorted((D, H)))] * 3 + [tuple(sorted((D, F)))] * 3 * (E + 1)
    newton_schulz = sum(5 * (4 * r * r * c + 2 * r**3) for r, c in muon)
    assert result["hardware_flops_per_step"] == forward + 4 * (back + recompute) + newton_schulz


def test_rows_of_other_ranks_and_threads_are_others(tool, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert tool._launcher() == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert tool._launcher() == ["torchrun", "--nproc-per-node", "4"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tool._launcher() == ["torchrun", "--nnodes", "2", "--nproc-per-node", "2"]
