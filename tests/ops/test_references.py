"""The plain-torch references against diffusers' modules, loops over elements, and what must hold by definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_nucleus.ops import attention, expert_choice, experts, moe_rows, norm, swiglu
from tests.ops.op_cases import Inputs, outputs_and_gradients


def test_gather_and_combine_are_the_loops_they_stand_for():
    x = Inputs(torch.float64)
    tokens, rows, weight, index = x(6, 3), x(11, 3), x(11), x.index(6, 11)
    expected = tokens.detach().clone()
    for n in range(11):
        assert torch.equal(moe_rows.gather_rows(tokens, index)[n], tokens[index[n]])
        expected[index[n]] += weight[n] * rows[n]
    torch.testing.assert_close(moe_rows.combine_rows(tokens, rows, weight, index), expected)


@pytest.mark.parametrize("function", [moe_rows.gather_rows, moe_rows.combine_rows, norm.modulated_layer_norm,
                                      norm.rms_norm, swiglu.swiglu, attention.attention])  # fmt: skip
def test_gradients_are_those_of_finite_differences(function):
    x = Inputs(torch.float64)
    args = {
        "gather_rows": lambda: (x(4, 3), x.index(4, 6)),
        "combine_rows": lambda: (x(4, 3), x(6, 3), x(6), x.index(4, 6)),
        "modulated_layer_norm": lambda: (x(2, 3, 5), x(2, 5), 1e-6, True),
        "rms_norm": lambda: (x(3, 5), x(5), 1e-6),
        "swiglu": lambda: (x(3, 6),),
        "attention": lambda: (x(1, 3, 2, 4), x(1, 5, 1, 4), x(1, 5, 1, 4), x.mask(1, 5)),
    }[function.__name__]()
    assert torch.autograd.gradcheck(function, args)


def test_attention_equals_repeated_heads_and_an_explicit_softmax():
    x = Inputs(torch.float64)
    args = x(2, 9, 6, 8), x(2, 14, 2, 8), x(2, 14, 2, 8), x.mask(2, 14)

    def explicit(q, k, v, mask):
        k, v = k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
        scores = torch.einsum("bshk,bthk->bhst", q, k) / math.sqrt(8)
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return torch.einsum("bhst,bthk->bshk", scores.softmax(-1), v).flatten(2)

    outputs, gradients = outputs_and_gradients(attention.attention, args)
    expected, expected_gradients = outputs_and_gradients(explicit, args)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_attention_of_no_images_is_empty():
    x = Inputs(torch.float32)
    args = x(0, 3, 4, 8), x(0, 5, 2, 8), x(0, 5, 2, 8), torch.ones(0, 5, dtype=torch.bool)
    outputs, gradients = outputs_and_gradients(attention.attention, args)
    assert [t.shape for t in outputs + gradients] == [(0, 3, 32), *(a.shape for a in args[:3])]


def test_masked_keys_have_no_influence_and_no_gradient():
    x = Inputs(torch.float32)
    q, k, v, mask = (
        x(1, 3, 2, 4),
        x(1, 6, 2, 4),
        x(1, 6, 2, 4),
        torch.tensor([[True, False, True, True, False, True]]),
    )
    outputs, (_, grad_k, grad_v) = outputs_and_gradients(attention.attention, (q, k, v, mask))
    kept = mask[0]
    torch.testing.assert_close(outputs[0], attention.attention(q, k[:, kept], v[:, kept]))
    assert grad_k[:, ~kept].abs().max() == 0
    assert grad_v[:, ~kept].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_diffusers_bit_for_bit(dtype, weight_dtype):
    normalization = pytest.importorskip("diffusers.models.normalization")
    module = normalization.RMSNorm(24, eps=1e-6).to(weight_dtype)
    x = Inputs(dtype)
    torch.nn.init.normal_(module.weight, generator=x.generator)
    values = 3 * x(5, 7, 24)
    assert torch.equal(norm.rms_norm(values, module.weight, 1e-6), module(values))


def test_modulated_layer_norm_has_zero_mean_and_unit_variance_before_its_scale():
    x = Inputs(torch.float64)
    values, scale = 5 + 3 * x(2, 4, 64), x(2, 64)
    modulated, plain = norm.modulated_layer_norm(values, scale, 0.0, with_plain=True)
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(plain.var(-1, correction=0), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(modulated, plain * (1 + scale)[:, None])
    assert norm.modulated_layer_norm(values, scale, 0.0)[1] is None


def test_swiglu_refuses_an_odd_width():
    """Halves of two and one columns would multiply by broadcasting."""
    with pytest.raises(ValueError, match="even width, has 3"):
        swiglu.swiglu(torch.ones(2, 3))


def test_swiglu_takes_the_gate_first():
    gate, up = torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    torch.testing.assert_close(swiglu.swiglu(torch.cat([gate, up], -1)), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_every_expert_takes_its_best_tokens_and_weights_sum_to_the_scale(use_sigmoid):
    B, S, E, C, scale = 4, 20, 6, 7, 2.5
    logits = Inputs(torch.float32)(B, S, E)
    index, weight = expert_choice.select(logits, C, use_sigmoid, scale)
    scores = logits.sigmoid() if use_sigmoid else logits.softmax(-1)
    for b in range(B):
        for e in range(E):
            taken = set(index[b, e].tolist())
            assert len(taken) == C
            assert taken == set(scores[b, :, e].sort(descending=True).indices[:C].tolist())
    total = torch.zeros(B, S).scatter_add(1, index.flatten(1), weight.flatten(1))
    picked = torch.zeros(B, S, dtype=torch.bool).scatter(1, index.flatten(1), True)
    torch.testing.assert_close(total[picked], torch.full((int(picked.sum()),), scale))
    assert not total[~picked].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_token_whose_scores_are_too_small_has_no_weight_instead_of_a_nan(dtype):
    """sigmoid(-20) = 2e-9 is 0 in float16, and so is the 1e-12 beside the sum."""
    logits = torch.full((1, 4, 3), -20.0, dtype=dtype)
    logits[0, 0] = 2.0
    logits.requires_grad_()
    index, weight = expert_choice.select(logits, 2, True, 2.5)
    weight.sum().backward()
    assert torch.isfinite(weight).all()
    assert torch.isfinite(logits.grad).all()
    first = weight[index == 0]
    # 8e-3: roundings of bf16.
    torch.testing.assert_close(first, torch.full_like(first, 2.5 / 3), rtol=8e-3, atol=0)
    if dtype == torch.float16:
        assert weight[index != 0].tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_every_expert_takes_distinct_tokens_the_same_every_time(dtype):
    logits = torch.zeros(2, 12, 3, dtype=dtype)
    logits[:, 7, 1] = 1.0
    index, weight = expert_choice.select(logits, 4, False, 1.0)
    again, _ = expert_choice.select(logits.clone(), 4, False, 1.0)
    assert torch.equal(index, again)
    assert all(len(set(row.tolist())) == 4 for row in index.flatten(0, 1))
    assert (index[:, 1, 0] == 7).all()
    total = torch.zeros(2, 12).scatter_add(1, index.flatten(1), weight.flatten(1).float())
    torch.testing.assert_close(total[total > 0], torch.ones(int((total > 0).sum())), rtol=1e-2, atol=0)


def test_choice_weights_carry_the_gradient_of_the_formula():
    """Finite differences at a point where no choice is close to flipping."""
    logits = 3 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.requires_grad_()
    for use_sigmoid in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, s=use_sigmoid: expert_choice.select(x, 2, s, 2.5)[1], logits
        )


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_and_experts_equal_diffusers_layer(use_sigmoid, dtype):
    """gather -> expert_ffn -> combine with select's choice is NucleusMoELayer, shared expert and router aside."""
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    B, S, D, E, hidden = 3, 12, 16, 4, 8
    layer = upstream.NucleusMoELayer(D, hidden, E, 1.5, use_sigmoid, 2.5)
    g = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    layer.to(dtype)
    x = torch.randn(B, S, D, generator=g).to(dtype)
    plain, time = torch.randn(B, S, D, generator=g).to(dtype), torch.randn(B, D, generator=g).to(dtype)
    expected = layer(x, plain, time)

    logits = layer.gate(torch.cat([time[:, None].expand(-1, S, -1), plain], -1))
    capacity = math.ceil(1.5 * S / E)
    index, weight = expert_choice.select(logits, capacity, use_sigmoid, 2.5)
    flat = (index + S * torch.arange(B).view(-1, 1, 1)).transpose(0, 1).flatten()
    rows = moe_rows.gather_rows(x.flatten(0, 1), flat).view(E, -1, D)
    rows = experts.expert_ffn(rows, layer.experts.gate_up_proj, layer.experts.down_proj)
    base = layer.shared_expert(x).flatten(0, 1)
    got = moe_rows.combine_rows(base, rows.flatten(0, 1), weight.transpose(0, 1).flatten(), flat)
    # bf16: we round a token's sum once, diffusers after every addition.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 4e-2)
    torch.testing.assert_close(got.view_as(expected), expected, rtol=rtol, atol=atol)


def test_expert_ffn_treats_every_expert_alone():
    x = Inputs(torch.float64)
    rows, gate_up, down = x(3, 4, 5), x(3, 5, 6), x(3, 3, 5)
    got = experts.expert_ffn(rows, gate_up, down)
    for e in range(3):
        gate, up = (rows[e] @ gate_up[e]).split(3, -1)
        torch.testing.assert_close(got[e], (F.silu(gate) * up) @ down[e])
