"""The CUDA extension as nvcc makes it, beside any build of torch: it opens, has shapes and gradients, no spills."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# What a process does with the library: no kernel runs, so no GPU is needed.
USE = """
import sys, torch, megatron_nucleus
megatron_nucleus.__path__.append(sys.argv[1])
from megatron_nucleus.backends import extension_cuda as ops
from megatron_nucleus.ops import registry

logits = torch.randn(2, 9, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
index, weight = ops.expert_choice(logits, 3, False, 2.5)
assert index.shape == weight.shape == (2, 4, 3) and index.dtype == torch.int64 and weight.dtype == torch.bfloat16
assert not index.requires_grad
weight.sum().backward()
assert logits.grad.shape == logits.shape
assert ops.square_sum(logits, logits[0]).dtype == torch.float64
try:
    ops.expert_choice(torch.randn(2, 9, 4), 3, False, 2.5)
except NotImplementedError:
    pass
else:
    raise AssertionError("a CPU tensor went to a GPU's kernel")
if not torch.cuda.is_available():
    reason = registry.why_unavailable("expert_choice", "extension_cuda", device_type="cuda")
    assert reason == "needs an NVIDIA GPU and a CUDA build of torch", reason
sizes = registry.Sizes(64, 4, 2, 16, experts=300, expert_width=8)
request = registry.Request("expert_choice", "extension_cuda", "cuda", torch.bfloat16, sizes)
assert ops.why_unfit(request) == "takes up to 256 experts, the model has 300"
assert ops.why_unfit(request._replace(sizes=sizes._replace(experts=256))) is None
print("used")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the library, for one kind of GPU."""
    folder = tmp_path_factory.mktemp("extension")
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT, env=os.environ | {"MN_BUILD_CUDA": "1", "MN_CUDA_ARCHS": "90", "NVCC_APPEND_FLAGS": "-Xptxas=-v"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def test_the_library_opens_and_has_shapes_and_gradients(built):
    command = [sys.executable, "-c", USE, str(built / "lib" / "megatron_nucleus")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "used", done.stderr


def test_no_kernel_spills(built):
    lines = [line for line in (built / "log").read_text().splitlines() if "spill stores" in line]
    assert len(lines) == 3 * (4 + 2 + 2) + 1  # three dtypes; add_up has one
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in lines)
