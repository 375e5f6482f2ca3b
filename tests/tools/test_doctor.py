"""tools/doctor.py: what it reports is what the registry does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_nucleus.backends import recorded
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.ops import registry

ROOT = Path(__file__).resolve().parents[2]


def doctor(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def test_report_lists_every_backend_with_its_state():
    done = doctor("--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.strip().splitlines()
    report = json.loads(last)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["device"] == "cpu"
    rows = {(r["op"], r["backend"]): r for r in report["backends"]}
    assert set(rows) == {(r.op, r.backend) for op in registry.operations() for r in registry.backends(op)}
    for (op, backend), row in rows.items():
        assert row["usable"] == (row["reason"] is None)
        if backend == "torch":
            assert row["usable"]
        if backend == "triton":
            assert not row["usable"]
            assert "needs" in row["reason"]
        if row["chosen"]:
            assert row["usable"]
            assert registry.choose(op, "auto", device_type="cpu").backend == backend
    assert sum(r["chosen"] for r in report["backends"]) == len(registry.operations())
    assert any("backends on cpu" in line for line in text)


def test_the_published_model_in_its_own_dtype_has_a_backend_for_every_operation():
    """Operations of the optimizer work on fp32 weights, whatever the activations are."""
    done = doctor("--json", "--device", "cuda", "--preset", "nucleus_image_17b")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["backends"]
    assert {r["op"] for r in rows if r["chosen"]} == set(registry.operations())
    refused = {r["backend"]: r["reason"] for r in rows if r["op"] == "square_sum"}
    assert "bfloat16" not in str(refused)


def test_a_models_sizes_change_the_answer_and_recorded_libraries_are_listed():
    done = doctor("--json", "--device", "cuda", "--preset", "demo", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.strip().splitlines()
    report = json.loads(last)
    rows = {r["backend"]: r for r in report["backends"] if r["op"] == "attention"}
    assert rows["flash_attn_2"]["reason"] == "takes bfloat16, float16, not float32"
    assert report["preset"] == "demo"
    assert {r["library"] for r in report["recorded"]} == {entry.name for entry in recorded.LIBRARIES}
    for row in report["recorded"]:
        assert row["read"]
        assert row["version"] is not None or row["reason"] or row["library"] == "apex"
    assert set(report["adamw"]) == {"apex"}
    assert any("never run by this project" in line for line in text)


def test_torchs_choice_of_an_attention_kernel_is_shown():
    report = json.loads(doctor("--json", "--device", "cpu").stdout.splitlines()[-1])
    assert report["torch_attention"] == {"without_masks": "flash", "with_masks": "flash"}


def test_an_unknown_preset_points_to_the_nearest():
    done = doctor("--preset", "dem")
    assert done.returncode == 2
    expected = f"error: --preset: 'dem' is not allowed (did you mean demo?); one of: {', '.join(PRESETS)}"
    assert done.stderr.strip() == expected


def test_unknown_device_is_one_line_and_exit_code_2():
    done = doctor("--device", "tpu")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --device: 'tpu' is not allowed; one of: cpu, cuda"
