"""torchao's FP8 against ours: linear layers by its own emulation on a CPU, experts by a stand-in for its product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_nucleus.core.precision import emulated

pytest.importorskip("torchao.float8", exc_type=ImportError)
torchao = pytest.importorskip("megatron_nucleus.backends.torchao", exc_type=ImportError)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("recipe", ["current", "rowwise"])
@pytest.mark.parametrize("tokens", [32, 21], ids=("aligned", "odd"))
def test_linear_layers_equal_our_emulation(recipe, tokens):
    """The same roundings: bit by bit but for the order of sums, which one bfloat16 step bounds."""
    layers = [nn.Sequential(nn.Linear(64, 48).bfloat16()) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    weight = layers[0][0].weight
    torchao.convert_linears(layers[0], frozenset({"0"}), recipe, emulate=True)
    emulated.convert_linears(layers[1], frozenset({"0"}), recipe)
    assert layers[0][0].weight is weight
    assert list(layers[0].state_dict()) == ["0.weight", "0.bias"]
    grad, results = normal(tokens, 48, seed=2), []
    for layer in layers:
        x = normal(tokens, 64, seed=1).requires_grad_()
        out = layer(x)
        results.append((out, *torch.autograd.grad(out, (x, *layer.parameters()), grad)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2**-7, atol=1e-3)


def test_fp32_goes_through_bfloat16():
    layer = nn.Sequential(nn.Linear(32, 48))
    torchao.convert_linears(layer, frozenset({"0"}), "rowwise", emulate=True)
    x = normal(16, 32).float().requires_grad_()
    out = layer(x)
    assert out.dtype is torch.float32
    assert torch.equal(out, out.bfloat16().float())
    out.sum().backward()
    assert x.grad.dtype is layer[0].weight.grad.dtype is torch.float32
    want = x.detach() @ layer[0].weight.detach().t() + layer[0].bias.detach()
    assert ((out.detach() - want).norm() / want.norm()).item() < 0.05


def test_only_the_named_layers_change():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    torchao.convert_linears(model, frozenset({"1"}), "rowwise", emulate=True)
    assert [type(layer).__name__ for layer in model] == ["Linear", "Float8Linear"]


@pytest.mark.parametrize("rows", [16, 21, 3])
def test_experts_are_handed_over_as_the_grouped_product_wants_them(rows, monkeypatch):
    """A, offsets and B as documented: rows in a row, END offsets, whole groups of 16, matrices column by column."""
    seen = []

    def product(*, A, B_t, offs, out_dtype, pad_token_groups_for_grouped_mm):
        groups, inputs, outputs = B_t.shape
        assert A.is_contiguous()
        assert A.dtype is B_t.dtype is out_dtype is torch.bfloat16
        assert B_t.stride() == (inputs * outputs, 1, inputs)
        assert offs.dtype is torch.int32
        assert offs.shape == (groups,)
        assert offs[-1] == len(A)
        assert (offs % 16 == 0).all()
        assert not pad_token_groups_for_grouped_mm
        seen.append(offs.tolist())
        parts, start = [], 0
        for end, matrix in zip(offs.tolist(), B_t, strict=True):
            parts.append(A[start:end] @ matrix)
            start = end
        return torch.cat(parts)

    monkeypatch.setattr(torchao, "_grouped_product", lambda: product)
    given = [normal(3, rows, 32), normal(3, 32, 96, seed=1) / 6, normal(3, 48, 32, seed=2) / 7]
    given = [t.requires_grad_() for t in given]
    out = torchao.expert_ffn(*given, recipe="rowwise")
    gate, up = torch.bmm(given[0], given[1]).chunk(2, -1)
    want = torch.bmm(F.silu(gate) * up, given[2])
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    grad = normal(3, rows, 32, seed=3)
    for got, expected in zip(
        torch.autograd.grad(out, given, grad), torch.autograd.grad(want, given, grad), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
    padded = -(-rows // 16) * 16
    assert seen[0] == [padded, 2 * padded, 3 * padded]


def test_it_refuses_a_cpu():
    assert "runs on cuda" in torchao.why_unavailable("cpu", "rowwise", True)


@pytest.mark.parametrize(
    ("capability", "linears", "experts"),
    [((8, 9), False, False), ((9, 0), True, True), ((10, 3), True, True), ((12, 0), True, False)],
)
def test_experts_need_a_gpu_that_the_grouped_product_takes(capability, linears, experts, monkeypatch):
    """A higher number is not enough: the product exists for generations 9 and 10 alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torchao.recorded, "drift", lambda *_: None)
    monkeypatch.setattr(torchao, "_grouped_module", lambda: (None, ()))
    assert (torchao.why_unavailable("cuda", "rowwise", False) is None) == linears
    reason = torchao.why_unavailable("cuda", "rowwise", True)
    assert (reason is None) == experts
    if linears and not experts:
        assert reason == "needs compute capability 9.0 to 10.9, this GPU has 12.0 (for experts)"
