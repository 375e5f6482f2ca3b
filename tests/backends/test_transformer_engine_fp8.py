"""The Transformer Engine adapter against a stand-in with the library's signatures: parameters, context, odd sizes."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from megatron_nucleus.backends import recorded
from megatron_nucleus.core.recompute import recomputing
from megatron_nucleus.ops import fp8
from tests.backends import transformer_engine_stand_in as stand_in

NAME = "megatron_nucleus.backends.transformer_engine_fp8"


@pytest.fixture
def backend(monkeypatch):
    stand_in.install(monkeypatch)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 128, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


EVERY = frozenset(f"blocks.{i}.{layer}" for i in range(2) for layer in ("one", "two"))


def expected(model: Model, x: torch.Tensor, recipe: str) -> torch.Tensor:
    for block in model.blocks:
        hidden = fp8.linear(x, block.one.weight, recipe) + block.one.bias
        x = fp8.linear(torch.tanh(hidden), block.two.weight, recipe)
    return x


def test_the_stand_in_has_the_recorded_signatures(backend):
    for module, name in ((backend.te, "fp8"), (backend.te_recipe, "recipes")):
        assert recorded.changes(module, recorded.library(f"transformer_engine {name}").calls) == []


@pytest.mark.parametrize("recompute", [False, True], ids=("kept", "recomputed"))
@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_values_and_gradients_with_any_number_of_tokens(backend, recipe, recompute):
    """Tokens filled up with zeros to the recipe's multiple: no value changes, forward or backward."""
    torch.manual_seed(0)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    backend.convert_linears(model, EVERY, recipe)
    if recompute:
        for block in model.blocks:
            block.forward = recomputing(block.forward, "full")
    x = torch.randn(3, 7, 128)
    results = []
    for outputs, owner in ((model(x), model), (expected(plain, x, recipe), plain)):
        outputs.square().sum().backward()
        results.append((outputs, *(p.grad for p in owner.parameters())))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("recipe", "contexts"), [("delayed", 1), ("current", 2)])
def test_delayed_scaling_ends_one_context_in_a_pass_however_many_blocks(backend, recipe, contexts):
    """Each end of an outermost context moves the history of all layers on; a recomputed block needs its own."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(16, 128)
    want = expected(model, x, "current")
    backend.convert_linears(model, EVERY, recipe)
    stand_in._State.ended = 0
    torch.testing.assert_close(model(x), want)
    assert stand_in._State.ended == contexts


def test_delayed_scaling_reduces_nothing_over_ranks(backend):
    """The library would add a collective of all ranks to every pass; here each rank scales what it holds."""
    assert backend._recipe("delayed").reduce_amax is False


def test_names_and_parameters_stay(backend):
    model = Model()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    backend.convert_linears(model, EVERY, "delayed")
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[n] is before[n] for n in before)
    assert list(model.state_dict()) == keys  # nothing of the library's own state


def test_weights_that_move_to_a_new_tensor_are_followed(backend):
    """As FSDP swaps gathered weights in, and as memory is given to a model from meta."""
    with torch.device("meta"):
        model = Model()
    backend.convert_linears(model, EVERY, "current")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view_as(parameter))
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), expected(model, x, "current"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gathered_weights_of_another_dtype_are_cast_outside_of_autocast(backend, dtype):
    """The library refuses inputs and weights of two dtypes; FSDP gathers bfloat16, previews compute in fp32."""
    model = Model()
    backend.convert_linears(model, EVERY, "current")
    model.to(torch.bfloat16)
    assert model.blocks[0].one(torch.ones(16, 128, dtype=dtype)).dtype is dtype


def test_why_not(backend, monkeypatch):
    assert "runs on cuda" in backend.why_unavailable("cpu", "current", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in backend.why_unavailable("cuda", "current", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backend.why_unavailable("cuda", "current", False) is None
    assert "10.0 required" in backend.why_unavailable("cuda", "mxfp8", False)
    assert backend.why_unavailable("cuda", "delayed", False) is None
    with monkeypatch.context() as patch:
        patch.setattr(backend.te_recipe, "DelayedScaling", lambda margin=0: None)
        assert "DelayedScaling with reduce_amax" in backend.why_unavailable("cuda", "delayed", False)
    monkeypatch.delattr(backend.te_recipe, "Float8BlockScaling")
    assert "Float8BlockScaling, which this version does not have" in backend.why_unavailable(
        "cuda", "blockwise", False
    )
