"""Orthogonalisation: what may be overwritten, and the optimizer's choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.ops import registry
from megatron_nucleus.ops.orthogonalize import normalise, orthogonalize
from megatron_nucleus.utils.errors import ConfigError
from tests.ops.op_cases import Inputs


def test_only_overwrite_may_touch_the_input_and_the_result_is_the_same():
    x = Inputs(torch.float32)
    stack = x.flat(3, 5, 9)
    before = stack.clone()
    result = orthogonalize(stack, 5)
    assert torch.equal(stack, before)
    assert torch.equal(orthogonalize(stack, 5, overwrite=True), result)
    assert not torch.equal(stack, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_one_whatever_the_layout(dtype):
    stack = Inputs(dtype).flat(2, 8, 12)
    turned = stack.mT.contiguous().mT
    for given, overwrite in ((stack, False), (turned, False), (turned, True), (stack.clone(), True)):
        got = normalise(given, overwrite)
        assert got.is_contiguous()
        assert got.dtype == dtype
        norms = torch.linalg.matrix_norm(got.double())
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=4e-3, atol=0)
    small = torch.full((1, 2, 2), 1e-30)
    assert float(normalise(small, False).abs().max()) == pytest.approx(
        1e-23
    )  # divided by the floor, not by itself


class Model(nn.Module):
    """One matrix that Muon trains."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        attention = nn.Module()
        attention.q = nn.Linear(6, 4, bias=False, dtype=dtype)
        block = nn.Module()
        block.attention = attention
        self.blocks = nn.ModuleList([block])


def stepped(backend: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(3)
    model = Model(dtype)
    optimizer = build_optimizer(model, OptimizerConfig(orthogonalize_backend=backend))
    parameter = model.blocks[0].attention.q.weight
    parameter.grad = torch.linspace(-1, 1, 24, dtype=dtype).view(4, 6).sin()
    optimizer.step(0.1)
    return parameter.detach()


def test_the_optimizer_takes_the_backend_that_is_named():
    reason = registry.why_unavailable("orthogonalize", "triton", device_type="cpu")
    if reason is not None:
        pytest.skip(reason)
    torch.testing.assert_close(stepped("triton"), stepped("torch"), rtol=1e-4, atol=1e-5)


def test_a_backend_that_cannot_serve_is_refused_when_the_optimizer_is_built():
    with pytest.raises(ConfigError, match="no backend 'tritn'.*did you mean triton"):
        stepped("tritn")
    with pytest.raises(
        ConfigError, match="takes float32, bfloat16, float16, not float64. Usable here: torch"
    ):
        stepped("triton", torch.float64)
    assert stepped("auto", torch.float64).dtype == torch.float64
