"""tools/bench_ops.py: every usable backend is timed, and the ratios are those of the printed times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nucleus.ops import registry
from megatron_nucleus.training.benchmark.op_cases import CASES, dims
from megatron_nucleus.training.benchmark.roofline import Ceilings
from megatron_nucleus.utils.errors import ConfigError
from tools import bench_ops
from tools.bench_ops import main

ROOT = Path(__file__).resolve().parents[2]


def bench(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "bench_ops.py"), *args]
    env = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
    }  # interpreted kernels have no speed
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_every_usable_backend_is_timed(tmp_path):
    table = tmp_path / "ops.md"
    done = bench(
        "--images", "2", "--tokens", "4", "--repeats", "2", "--device", "cpu", "--json", "--record", str(table)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["images"], report["tokens"], report["threads"], report["device"]) == (2, 4, 1, "cpu")
    usable = [
        (op, row.backend)
        for op in registry.operations()
        for row in registry.backends(op)
        if not row.backend.startswith("triton")
        and registry.why_unavailable(op, row.backend, device_type="cpu", dtype=torch.float32) is None
    ]
    assert sorted((r["op"], r["backend"]) for r in report["rows"]) == sorted(usable)
    assert {"gated_residual_norm", "norm_rope"} <= {r["op"] for r in report["rows"]}
    torch_s = {r["op"]: r for r in report["rows"] if r["backend"] == "torch"}
    ceilings = Ceilings(**report["ceilings"])
    sizes = dims("demo", images=2, tokens=4)
    for row in report["rows"]:
        cost = CASES[row["op"]].cost(sizes, 4)
        assert (row["flops"], row["bytes"]) == (cost.forward_flops, cost.forward_bytes)
        for part in ("forward", "step") if cost.backward_flops is not None else ("forward",):
            assert row[f"{part}_ratio"] == torch_s[row["op"]][f"{part}_s"] / row[f"{part}_s"]
            assert row[f"{part}_min_s"] <= row[f"{part}_p25_s"] <= row[f"{part}_s"] <= row[f"{part}_p75_s"]
        assert row["bytes_per_s"] >= ceilings.bytes_per_s
        near = ceilings._replace(bytes_per_s=row["bytes_per_s"])
        least_s = max(cost.forward_flops / near.flops_per_s, cost.forward_bytes / near.bytes_per_s)
        assert row["forward_of_ceiling_frac"] == pytest.approx(least_s / row["forward_s"])
        if "step_s" in row:
            both_s = least_s + near.floor_s(cost.backward_flops, cost.backward_bytes)
            assert row["step_of_ceiling_frac"] == pytest.approx(both_s / row["step_s"])
    written = table.read_text()
    assert written.count("| demo |") == len(report["rows"])
    assert "1. `tools/bench_ops.py --images 2 --tokens 4 --repeats 2 --device cpu`" in written
    (stored,) = json.loads(table.with_suffix(".json").read_text())
    assert stored["result"] == report


def test_a_backend_that_fails_is_said_and_the_others_are_timed(monkeypatch, capsys):
    def refuse(x):
        raise RuntimeError("no such\n  tile")

    rows = (registry.backends("swiglu")[0], registry.backends("swiglu")[0]._replace(backend="broken"))
    monkeypatch.setattr(registry, "backends", lambda op: rows)
    monkeypatch.setattr(registry, "why_unavailable", lambda *args, **kwargs: None)
    real = registry.resolve
    monkeypatch.setattr(
        registry, "resolve", lambda op, name, **asked: refuse if name == "broken" else real(op, name, **asked)
    )
    monkeypatch.setattr(bench_ops, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e10))
    main(["--ops", "swiglu", "--images", "1", "--tokens", "8", "--repeats", "1", "--device", "cpu", "--json"])
    lines = capsys.readouterr().out.splitlines()
    broken, working = json.loads(lines[-1])["rows"]
    assert broken == {"shape": "demo", "op": "swiglu", "backend": "broken", "failed": "no such tile"}
    assert working["backend"] == "torch"
    assert working["bytes"] == 8 * 3 * 128 * 4  # [8, 256] in, [8, 128] out
    assert any(line.split() == ["swiglu", "broken", "failed:", "no", "such", "tile"] for line in lines)


def only(monkeypatch, torch_function, other_function) -> list[dict]:
    """Rows of `swiglu` with these two in the place of its backends."""
    plain = registry.backends("swiglu")[0]
    functions = {"torch": torch_function, "other": other_function}
    monkeypatch.setattr(registry, "backends", lambda op: (plain, plain._replace(backend="other")))
    monkeypatch.setattr(registry, "why_unavailable", lambda *args, **kwargs: None)
    monkeypatch.setattr(registry, "resolve", lambda op, name, **asked: functions[name])
    settings = bench_ops.Settings(("demo",), ("swiglu",), 1, 8, 1, 3, "cpu", "float32")
    return bench_ops.measure("swiglu", "demo", dims("demo", 1, 8), settings, Ceilings(1e12, 1e10))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no such gradient")


def test_a_backend_that_fails_backward_is_said_and_the_others_are_timed(monkeypatch):
    broken, working = only(monkeypatch, torch.sigmoid, NoBackward.apply)
    assert broken == {"shape": "demo", "op": "swiglu", "backend": "other", "failed": "no such gradient"}
    assert working["backend"] == "torch"
    assert working["step_ratio"] == 1.0


def test_without_plain_torch_there_is_no_ratio(monkeypatch, capsys):
    """Such as where it alone runs out of memory."""
    broken, working = only(monkeypatch, NoBackward.apply, torch.sigmoid)
    assert (broken["backend"], broken["failed"]) == ("torch", "no such gradient")
    assert (working["forward_ratio"], working["step_ratio"]) == (None, None)
    assert working["step_s"] > 0
    facts = {"hardware": "h", "versions": {"torch": "2"}, "commit": None, "command": "c"}
    result = {
        "rows": [broken, working],
        "dtype": "float32",
        "threads": 1,
        "ceilings": Ceilings(1e12, 1e10)._asdict(),
    }
    lines = [
        line for line in bench_ops.markdown([facts | {"result": result}]).splitlines() if "swiglu" in line
    ]
    assert [cell.strip() for cell in lines[1].split("|")][6] == "-"
    assert " - " in capsys.readouterr().out.splitlines()[-1]


def test_backends_take_turns_in_both_directions(monkeypatch):
    """Whoever runs second finds warm caches, and a clock that has throttled."""
    calls: list[str] = []

    def named(name: str):
        def function(x):
            if not torch.is_grad_enabled():
                calls.append(name)
            return torch.sigmoid(x)

        return function

    only(monkeypatch, named("a"), named("b"))
    assert "".join(calls) == "abbaabbaab"  # two rounds of warm-up, three that are timed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "0"), "--tokens: must be at least 1, got 0"),
        (("--repeats", "many"), "--repeats: expected a whole number, got 'many'"),
        (("--device", "npu"), "--device: 'npu' is not allowed.*one of: cpu, cuda"),
        (("--shapes", "dmeo"), "--shapes: 'dmeo' is not allowed .did you mean demo"),
        (("--ops", "swigul"), "--ops: 'swigul'.*did you mean swiglu"),
        (("--dtype", "float64"), "--dtype: 'float64' is not allowed"),
        (("--record", "t.txt"), "--record t.txt"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ConfigError, match=message):
        main(list(args))


def test_an_error_is_one_line_and_exit_code_2():
    done = bench("--tokens", "0")
    assert (done.returncode, done.stderr.strip()) == (2, "error: --tokens: must be at least 1, got 0")
