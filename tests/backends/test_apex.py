"""Apex's AdamW against torch's, through a stand-in that repeats its source; and refusals of what it cannot update."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from torch import nn

from megatron_nucleus.core.optimizer import adamw
from megatron_nucleus.core.optimizer.adamw import AdamW, AdamWParam
from megatron_nucleus.utils.errors import ConfigError
from tests.backends import stand_ins

ADAPTER = adamw.ADAMW_BACKENDS["apex"]


def kernel(given: dict) -> None:
    """csrc/multi_tensor_adam.cu, mode 1."""
    chunk, flag, lists, lr, beta1, beta2, eps, step, mode, correct_bias, decay = given.values()
    assert (chunk, mode, correct_bias) == (65536, 1, 1)
    assert flag.dtype == torch.int32
    assert step >= 1
    for g, p, m, v in zip(*lists, strict=True):
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        root = torch.sqrt(v / (1 - beta2**step)) + eps
        p.sub_(lr * (m / (1 - math.pow(beta1, step)) / root + decay * p))


@pytest.fixture
def apex(monkeypatch):
    """The adapter over the stand-in, on a machine that seems to have a GPU."""
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    library = stand_ins.module_of("apex", {"multi_tensor_adam": kernel, "multi_tensor_l2norm": dict})
    stand_ins.install(monkeypatch, library)
    module = importlib.import_module(ADAPTER)
    monkeypatch.setattr(module, "why_no_gpu", lambda device_type: None)
    yield module
    sys.modules.pop(ADAPTER, None)


def parameters(dtype: torch.dtype = torch.float32) -> list[AdamWParam]:
    generator = torch.Generator().manual_seed(0)
    shapes, decays = ((3, 5), (7,), (2, 2, 2)), (0.1, 0.0, 0.1)
    return [
        AdamWParam(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)), 1.0 + i, decay)
        for i, (shape, decay) in enumerate(zip(shapes, decays, strict=True))
    ]


def test_five_steps_equal_torchs(apex):
    runs = []
    for backend in ("torch", "apex"):
        params = parameters()
        optimizer = AdamW(params, beta1=0.9, beta2=0.95, eps=1e-8, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            for p in params:
                p.param.grad = torch.randn(p.param.shape, generator=generator)
            optimizer.step(1e-2 / (1 + step))
        runs.append([p.param.detach() for p in params] + list(optimizer.tensors().values()))
        assert optimizer.steps == 5
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


def test_without_the_library_the_choice_is_refused():
    if "amp_C" in sys.modules:
        pytest.skip("apex is installed")
    with pytest.raises(
        ConfigError, match=r"^--adamw-backend apex: needs amp_C, not installed\. Usable here: torch\.$"
    ):
        AdamW(parameters(), beta1=0.9, beta2=0.95, eps=1e-8, backend="apex")


def test_what_the_kernel_cannot_update_is_refused_at_the_start(apex):
    with pytest.raises(ConfigError, match="takes float32 parameters, 'p0' is torch.float64"):
        AdamW(parameters(torch.float64), beta1=0.9, beta2=0.95, eps=1e-8, backend="apex")
    bent = [AdamWParam("bent", nn.Parameter(torch.zeros(3, 4).T), 1.0, 0.0)]
    with pytest.raises(ConfigError, match="takes contiguous parameters, 'bent' is not"):
        AdamW(bent, beta1=0.9, beta2=0.95, eps=1e-8, backend="apex")
