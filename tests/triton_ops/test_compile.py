"""Every kernel compiles to Hopper machine code, fits its registers and shared memory, and is launched sensibly."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

REPORT = Path(__file__).with_name("compile_report.py")
# An H100/H200 multiprocessor: 65,536 registers, 227 KiB of shared memory per block.
REGISTERS, SHARED_BYTES = 65_536, 227 * 1024


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """By compute capability, and by kernel."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(REPORT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(reports):
    return reports["90"]


def test_no_kernel_spills_and_its_blocks_fit_a_multiprocessor(report):
    for name, used in report.items():
        blocks = used["blocks"]
        assert used["spilled_bytes"] == 0, (name, used)
        assert blocks * used["registers"] * 32 * used["warps"] <= REGISTERS, (name, used)
        assert blocks * used["shared_bytes"] <= SHARED_BYTES, (name, used)


def test_products_fit_the_generations_before_and_after_hopper(reports):
    """On an A100 the experts' spills a few hundred bytes; tools/tune_ops.py finds a smaller tile there."""
    assert set(reports["80"]) == set(reports["100"]) == {"symmetric product", "experts"}
    for name in reports["80"]:
        assert reports["80"][name]["shared_bytes"] <= 163 * 1024, name  # an A100's block
        assert reports["100"][name]["shared_bytes"] <= SHARED_BYTES, name  # a B200's, as Hopper's
        assert reports["100"][name]["spilled_bytes"] == 0, name


def test_products_run_on_hoppers_own_tensor_core_instructions(report):
    products = {name for name, used in report.items() if used["tensor_core_products"]}
    assert products == {"symmetric product", "symmetric product, fp32", "experts", "experts, fp32"}


def test_every_kernel_is_in_the_report(report):
    jitted = {
        f"{path.stem}.{node.name}"
        for path in (REPORT.parents[2] / "triton_ops").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("kernel")  # the others are parts of kernels
        and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    source = REPORT.read_text()
    assert jitted
    assert all(kernel in source for kernel in jitted)
    assert len(report) >= len(jitted)
