"""tools/bench_ops.py: every usable backend is timed, and the ratios are those of the printed times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_nucleus.ops import registry

ROOT = Path(__file__).resolve().parents[2]


def bench(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "bench_ops.py"), *args]
    env = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"
    }  # interpreted kernels have no speed
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_every_usable_backend_is_timed():
    done = bench("--images", "2", "--tokens", "4", "--repeats", "1", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["images"], report["tokens"], report["threads"], report["device"]) == (2, 4, 1, "cpu")
    usable = [
        (op, row.backend)
        for op in registry.operations()
        for row in registry.backends(op)
        if row.backend != "triton" and registry.why_unavailable(op, row.backend, device_type="cpu") is None
    ]
    assert sorted((r["op"], r["backend"]) for r in report["rows"] if r["backend"] != "triton") == sorted(
        usable
    )
    torch_s = {r["op"]: r for r in report["rows"] if r["backend"] == "torch"}
    for row in report["rows"]:
        assert row["forward_ratio"] == torch_s[row["op"]]["forward_s"] / row["forward_s"]
        assert row["step_ratio"] == torch_s[row["op"]]["step_s"] / row["step_s"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "0"), "error: --tokens: must be at least 1, got 0"),
        (("--repeats", "many"), "error: --repeats: expected a whole number, got 'many'"),
        (("--device", "npu"), "error: --device: 'npu' is not allowed; one of: cpu, cuda"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(args, message):
    done = bench(*args)
    assert (done.returncode, done.stderr.strip()) == (2, message)
