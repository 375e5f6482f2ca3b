"""A device without memory ends the run with what was asked for, the forecast and what to change."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_nucleus.core.parallel_state import single_process
from megatron_nucleus.training import out_of_memory
from megatron_nucleus.training import training as loop
from megatron_nucleus.training.arguments import parse_run
from megatron_nucleus.training.initialize import run_shape
from megatron_nucleus.training.out_of_memory import (
    MemoryGuard,
    OutOfMemory,
    asked_bytes,
    is_out_of_memory,
    size,
)
from megatron_nucleus.training.planning import memory
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.utils.config import Parser
from tests.support import ROOT
from tests.training.runs import run_here

PETABYTE = 1 << 50


def failing(step: int, error: Exception | None = None):
    """A forward pass that takes more than there is in the ``step``th micro-batch; the one of step 1 runs as ever."""
    real, calls = loop.forward_backward, []

    def run(*args, **kwargs):
        calls.append(1)
        if len(calls) < step:
            return real(*args, **kwargs)
        if error is not None:
            raise error
        return torch.empty(PETABYTE, dtype=torch.uint8)

    return run


def test_a_failed_allocation_of_a_real_step_is_explained(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "forward_backward", failing(2))
    with pytest.raises(OutOfMemory) as caught:
        run_here(config_file, tmp_path / "run")
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "can't allocate memory" in str(caught.value.__cause__)
    assert message.startswith("out of memory on rank 0 in step 2, at ")
    assert "1048576.00 GiB more were asked for" in message
    run, _ = parse_run(["--config", str(config_file)], Parser(prog="t"))
    guard = MemoryGuard(run, single_process(torch.device("cpu"), 4))
    guard.shape = run_shape(run, 256)
    guard.batch = MicroBatch(8, 16, int(message.split(" image + ")[1].split()[0]))
    parts = memory.peak(guard.work())
    for name, count in parts._asdict().items():
        assert f"{name} {size(count)}" in message
    assert f"together {size(parts.total)}" in message
    assert "cheapest change that is expected to fit: --" in message
    assert "no forecast" not in message
    assert "no advice" not in message


def test_exit_code_and_one_line(config_file, tmp_path):
    """As a user sees it: tools/train.py, with a GPU's error in step 2."""
    script = tmp_path / "start.py"
    script.write_text(
        f"""
import runpy, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from megatron_nucleus.training import training
real, calls = training.forward_backward, []
def forward_backward(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79")
    return real(*args, **kwargs)
training.forward_backward = forward_backward
sys.argv = ["tools/train.py", "--config", {str(config_file)!r}, "--run-dir", {str(tmp_path / "run")!r}]
runpy.run_path({str(ROOT / "tools" / "train.py")!r}, run_name="__main__")
"""
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2, ended.stderr[-2000:]
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory on rank 0 in step 2")
    assert "2.50 GiB more were asked for" in last
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("broken", ["peak", "cheapest_change"])
def test_a_failure_in_the_message_hides_nothing(broken, config_file, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("by chance")

    owner = memory if broken == "peak" else out_of_memory
    monkeypatch.setattr(owner, broken, fail)
    monkeypatch.setattr(loop, "forward_backward", failing(1))
    with pytest.raises(OutOfMemory, match="1048576.00 GiB more were asked for") as caught:
        run_here(config_file, tmp_path / "run")
    assert "(no advice: ZeroDivisionError: by chance)" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_model_too_large_is_explained_before_the_first_step(config_file, tmp_path, monkeypatch):
    def allocate(*args):
        torch.empty(PETABYTE, dtype=torch.uint8)

    monkeypatch.setattr(loop, "build_optimizer", allocate)
    with pytest.raises(OutOfMemory, match="before the first step.*optimizer [0-9.]+ MiB"):
        run_here(config_file, tmp_path / "run")


def test_other_errors_pass(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "forward_backward", failing(1, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_here(config_file, tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has", 512 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("CUDA error: out of memory", None),
    ],
)
def test_what_was_asked_for(text, asked):
    error = torch.OutOfMemoryError(text) if text.startswith("CUDA out") else RuntimeError(text)
    assert is_out_of_memory(error)
    assert asked_bytes(error) == asked
    assert not is_out_of_memory(RuntimeError("out of ideas"))
    assert not is_out_of_memory(ValueError(text))


def test_the_forecast_of_a_run_is_that_of_its_own_settings(config_file):
    """Backends and the device's arithmetic are those of this machine."""
    run, _ = parse_run(["--config", str(config_file), "--micro-batch-size", "2"], Parser(prog="t"))
    guard = MemoryGuard(run, single_process(torch.device("cpu"), 4))
    work = guard.work()
    assert (work.device_type, work.muon_bytes, work.layout.world) == ("cpu", 4, 1)
    assert (work.batch.images, work.accumulation) == (2, 4)
    plain = dataclasses.replace(run, kernels=dataclasses.replace(run.kernels, swiglu_backend="torch"))
    assert "swiglu" in MemoryGuard(plain, guard.parallel).work().plain
