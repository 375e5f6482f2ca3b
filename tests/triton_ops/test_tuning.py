"""Tuned tiles: found by hardware, operation and shape class; a damaged file is named; the tuner takes what is right."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from megatron_nucleus.backends import triton as backend
from megatron_nucleus.ops import registry
from megatron_nucleus.utils.errors import ConfigError
from triton_ops import expert_ffn, swiglu, symmetric, tuner, tuning
from triton_ops.tuning import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tile(rows=16, columns=16, depth=16, warps=4, stages=2)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the file of this machine's device; returns its path."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)

    def forget() -> None:
        tuning.table.cache_clear()
        tuning.pick.cache_clear()

    def write_file(content: object) -> str:
        path = tmp_path / f"{tuning.hardware_name(DEVICE)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        forget()
        return str(path)

    forget()
    yield write_file
    forget()


def entry(op: str, shape: str, tile: Tile = SMALL) -> dict:
    return tuning.content("a GPU", {"triton": "0"}, [(op, shape, tile, 1e-6, 2e-6)])


def test_hardware_is_named_by_its_device(monkeypatch):
    name = tuning.hardware_name.__wrapped__  # past its cache
    assert name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert name(torch.device("cuda")) == "nvidia_h100_80gb_hbm3"


@pytest.mark.parametrize(("rows", "rounded"), [(0, 1), (1, 1), (4096, 4096), (4097, 8192)])
def test_shape_classes_round_what_follows_the_batch(rows, rounded):
    name = tuning.shape_class(torch.bfloat16, about={"N": rows}, exactly={"D": 2048, "F": 1344})
    assert name == f"bfloat16 N<={rounded} D=2048 F=1344"


def test_without_a_file_the_default_runs_and_is_logged_once(write, caplog):
    with caplog.at_level(logging.INFO, "triton_ops"):
        for _ in range(2):
            assert tuning.pick("swiglu", "float32 N<=4 F=8", SMALL, DEVICE) == SMALL
    expected = (
        "swiglu, float32 N<=4 F=8: rows 16, columns 16, depth 16, warps 4, stages 2 (default, not tuned here)"
    )
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_file_of_another_hardware_is_not_read(write, tmp_path):
    (tmp_path / "another_gpu.json").write_text("not JSON")
    assert tuning.table(tuning.hardware_name(DEVICE)) == {}
    assert tuning.why_unusable(DEVICE) is None


def test_a_tuned_tile_reaches_the_kernel_for_its_class_only(write, monkeypatch):
    """Operations are called as the model calls them; what the launcher gets is the file's tile."""
    x, weight = torch.randn(1, 20, 8, device=DEVICE), torch.randn(1, 8, 12, device=DEVICE)
    write(entry("expert_ffn", expert_ffn.shape_of(x, 6)))
    seen = []
    launch = expert_ffn.launch
    monkeypatch.setattr(expert_ffn, "launch", lambda *a: seen.append(a[-1]) or launch(*a))
    hidden, _ = expert_ffn.expert_gate_up(x, weight, False)
    expert_ffn.expert_gate_up(x[:, :16].contiguous(), weight, False)
    assert seen == [SMALL, expert_ffn.DEFAULT_FP32]
    gate, up = (x @ weight).chunk(2, -1)
    torch.testing.assert_close(hidden, torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


def test_every_op_reads_its_own_class(write):
    x, rows = torch.randn(1, 6, 9, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    for op, shape, pick in (
        ("symmetric_product", symmetric.shape_of(x), lambda: symmetric.tile_for(x)),
        ("swiglu", swiglu.shape_of(rows), lambda: swiglu.tile_for(rows)),
        ("expert_ffn", expert_ffn.shape_of(x, 4), lambda: expert_ffn.tile_for(x, 4)),
    ):
        write(entry(op, shape))
        assert pick() == SMALL


TILE = SMALL._asdict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "must be an object with exactly hardware, versions, tiles, seconds"),
        ({"tiles": {}}, "must be an object with exactly hardware, versions, tiles, seconds"),
        ({**entry("a", "b"), "tiles": {"a": 1}}, "tiles must be operation -> shape class -> tile"),
        ({**entry("a", "b"), "tiles": {"a": {"b": {"rows": 8}}}}, "tiles, a, 'b': must be an object with exactly rows"),
        ({**entry("a", "b"), "tiles": {"a": {"b": {**TILE, "rows": 24}}}}, "rows must be a power of two in 1..1024"),
        ({**entry("a", "b"), "tiles": {"expert_ffn": {"b": {**TILE, "depth": 8}}}}, "power of two in 16..1024, got 8"),
        ({**entry("a", "b"), "tiles": {"a": {"b": {**TILE, "warps": 64}}}}, "warps must be a power of two in 1..32"),
        ({**entry("a", "b"), "tiles": {"a": {"b": {**TILE, "stages": 0}}}}, "stages must be an integer in 1..8, got 0"),
        ({**entry("a", "b"), "tiles": {"a": {"b": {**TILE, "depth": True}}}}, "depth must be a power of two"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_when_a_backend_is_chosen(write, content, message):
    """At start-up, with the file's name: not in the middle of a step."""
    path = write(content)
    with pytest.raises(ValueError, match="swiglu|" + path):
        tuning.table(tuning.hardware_name(DEVICE))
    with pytest.raises(ConfigError) as error:
        registry.resolve("swiglu", "triton", device_type=DEVICE.type)
    assert f"has a damaged file of tile sizes: {path}" in str(error.value)
    assert message in str(error.value)
    assert "Usable here:" in str(error.value)


def test_widths_that_no_tile_holds_are_refused_when_a_model_is_built():
    sizes = registry.Sizes(9216, 72, 8, 128, 8, 128)
    request = registry.Request("gated_residual_norm", "triton", DEVICE.type, None, sizes)
    assert backend.why_unfit(request) == "takes rows of at most 4096 values, the model's have 9216"
    norm = request._replace(op="modulated_layer_norm")
    assert backend.why_unfit(norm) == "takes rows of at most 8192 values, the model's have 9216"
    assert backend.why_unfit(request._replace(sizes=sizes._replace(width=4096))) is None
    assert backend.why_unfit(request._replace(op="swiglu")) is None
    assert backend.why_unfit(request._replace(sizes=None)) is None
    odd = request._replace(op="norm_rope", sizes=sizes._replace(head_width=4096))
    assert backend.why_unfit(odd) == "takes heads of an even width up to 2048, the model's have 4096"


def work(results: dict[Tile, object]) -> tuner.Work:
    """An operation whose tiles give fixed results, or raise them."""

    def run(tile: Tile) -> tuple[torch.Tensor, ...]:
        result = results[tile]
        if isinstance(result, Exception):
            raise result
        run.last = tile
        return (torch.tensor(result),)

    return tuner.Work("op", "class", tuple(results), next(iter(results)), run)


def test_the_tuner_takes_the_fastest_tile_that_is_right():
    default, fast, faster, wrong, nan, large = (SMALL._replace(depth=d) for d in (16, 32, 64, 128, 256, 512))
    seconds = {default: 4e-6, fast: 3e-6, faster: 2e-6, wrong: 1e-6, nan: 1e-6, large: 1e-6}
    made = work(
        {
            default: [1.0, 2.0],
            fast: [1.0, 2.0001],
            faster: [1.0, 2.0],
            wrong: [1.0, 2.1],
            nan: [1.0, float("nan")],
            large: RuntimeError("out of resource: shared memory"),
        }
    )

    def measure(call) -> float:
        call()
        return seconds[made.run.last]

    outcome = tuner.choose(made, measure)
    assert (outcome.tile, outcome.seconds, outcome.default_seconds) == (faster, 2e-6, 4e-6)
    assert outcome.refused[large] == "out of resource: shared memory"
    assert outcome.refused[wrong] == "results differ by 0.05 of the largest"
    assert "nan" in outcome.refused[nan]
    assert set(outcome.refused) == {wrong, nan, large}


def test_a_default_tile_that_does_not_run_is_named():
    made = work({SMALL: ValueError("out of resource: shared memory"), SMALL._replace(depth=32): [1.0]})
    with pytest.raises(RuntimeError, match="op, class: the default tile does not run here: out of resource"):
        tuner.choose(made, lambda call: call())


def test_the_tuner_covers_the_model_and_its_results_are_those_of_the_operations(write):
    """Every work once at a tiny model; the default tile's own results against plain products."""
    works = tuner.works(
        torch.float32,
        DEVICE,
        experts=2,
        rows=(4, 8),
        width=16,
        hidden=8,
        matrices=[(8, 16), (8, 8), (8, 16)],
        stack_values=256,
    )
    seen, outcomes = [], []
    for made in works:
        seen.append((made.op, made.shape))
        outcomes.append(tuner.choose(made._replace(candidates=made.candidates[:2]), lambda call: 1e-6))
    assert seen == [
        ("expert_ffn", "float32 N<=4 D=16 F=8"),
        ("swiglu", "float32 N<=8 F=8"),
        ("expert_ffn", "float32 N<=8 D=16 F=8"),
        ("swiglu", "float32 N<=16 F=8"),
        ("symmetric_product", "float32 R=8 C=8"),
        ("symmetric_product", "float32 R=8 C=16"),
    ]
    assert not any(outcome.refused for outcome in outcomes)
    plain = [tuple(o)[:5] for o in outcomes]
    write(tuning.content("a GPU", {}, plain))
    assert tuning.table(tuning.hardware_name(DEVICE))["swiglu"]["float32 N<=16 F=8"] == swiglu.DEFAULT
