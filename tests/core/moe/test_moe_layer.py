"""The fixed-shape expert path, against a loop over experts written from the definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.init import init_weights
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.moe.moe_layer import MoELayer
from megatron_nucleus.core.moe.router import capacity


def build(factor=2.0, **changes):
    shape = dataclasses.replace(PRESETS["demo"], capacity_factors=(factor,) * 4, **changes)
    layer = MoELayer(shape, 1, resolve_kernels())
    init_weights(layer, 0)
    with torch.no_grad():
        layer.router.weight.mul_(20)
    return layer.double()


def by_definition(layer, x, plain, temb):
    """Expert by expert, token by token; no batching, no gather."""
    B, S, _ = x.shape
    E = layer.router.weight.shape[0]
    C = max(1, math.ceil(layer.router.factor * S / E))
    out = torch.stack([layer.shared_expert(x[b]) for b in range(B)])
    for b in range(B):
        scores = F.softmax(
            torch.stack([layer.router.weight @ torch.cat([temb[b], plain[b, s]]) for s in range(S)]), -1
        )
        taken = [scores[:, e].argsort(descending=True)[:C].tolist() for e in range(E)]
        for s in range(S):
            experts = [e for e in range(E) if s in taken[e]]
            total = sum(scores[s, e] for e in experts)
            for e in experts:
                gate, up = (x[b, s] @ layer.experts.gate_up[e]).chunk(2)
                row = (F.silu(gate) * up) @ layer.experts.down[e]
                out[b, s] = out[b, s] + layer.router.route_scale * scores[s, e] / total * row
    return out


@pytest.mark.parametrize("factor", [0.5, 2.0, 8.0])
def test_layer_equals_the_definition_forward_and_backward(factor):
    layer = build(factor)
    g = torch.Generator().manual_seed(0)
    x, plain, temb = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 9, 128), (2, 9, 128), (2, 128))
    )
    probe = torch.randn(2, 9, 128, generator=g, dtype=torch.float64)
    results = []
    for run in (lambda *a: layer(*a)[0], lambda *a: by_definition(layer, *a)):
        inputs = [t.clone().requires_grad_() for t in (x, plain, temb)]
        out = run(*inputs)
        gradients = torch.autograd.grad((out * probe).sum(), [*inputs, *layer.parameters()])
        results.append([out, *gradients])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


def test_every_expert_takes_exactly_its_capacity_and_weights_are_conserved():
    layer = build(2.0)
    x = torch.randn(3, 16, 128, dtype=torch.float64)
    _, routing = layer(x, x, torch.randn(3, 128, dtype=torch.float64))
    assert routing.index_BEC.shape == (3, 8, 4)
    assert all(len(set(row.tolist())) == 4 for row in routing.index_BEC.flatten(0, 1))  # no token twice
    per_token = torch.zeros(3, 16, dtype=torch.float64)
    per_token.scatter_add_(1, routing.index_BEC.flatten(1), routing.weight_BEC.flatten(1))
    picked = per_token > 0
    torch.testing.assert_close(per_token[picked], torch.full_like(per_token[picked], 2.5))


def router_gradient(factor: float) -> tuple[float, bool]:
    layer = build(factor)
    g = torch.Generator().manual_seed(5)
    x, temb = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((1, 64, 128), (1, 128)))
    out, routing = layer(x, x, temb)
    out.square().sum().backward()
    alone = routing.index_BEC.flatten().unique(return_counts=True)[1].max().item() == 1
    return layer.router.weight.grad.abs().max().item(), alone


def test_tokens_that_one_expert_alone_picked_give_the_router_no_gradient():
    """Such a token's weight is route_scale whatever its score: why capacity starts high in training."""
    shared, alone_at_8 = router_gradient(8.0)
    lonely, alone_at_one = router_gradient(0.1)  # one token per expert
    assert alone_at_one
    assert not alone_at_8
    assert lonely < 1e-6 * shared  # what is left comes from the 1e-12 in the denominator


def test_capacity_is_never_rounded_and_never_too_large():
    assert capacity(2.0, 4096, 64) == 128
    assert capacity(2.0, 100, 64) == 4  # ceil(3.125)
    assert capacity(0.001, 16, 64) == 1
    assert capacity(8.0, 16, 8) == 16
    with pytest.raises(ValueError, match="lower model.capacity_factors"):
        capacity(9.0, 16, 8)
