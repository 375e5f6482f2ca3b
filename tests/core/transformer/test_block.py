"""A block's modulation and gates against the formula, with attention and feed-forward replaced by known maps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.transformer.block import TransformerBlock

SHAPE = dataclasses.replace(
    PRESETS["demo"], num_layers=2, dense_moe_strategy="leave_first_block_dense", capacity_factors=(0.0, 2.0)
)
D = SHAPE.width
TIMES = torch.linspace(1, 10, 10, dtype=torch.double)


class Times(nn.Module):
    """Multiplies by a number and remembers what came in."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x, *_):
        self.seen = x
        return self.factor * x


@pytest.fixture
def block():
    block = TransformerBlock(SHAPE, 0, resolve_kernels()).double()
    block.attention, block.feed_forward = Times(3.0), Times(-2.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        block.modulation.weight.normal_(0, 0.2, generator=generator)
        block.modulation.bias.normal_(0, 2.0, generator=generator)  # some gates beyond 2
    return block


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def run(block, x, act):
    out, routing = block(x, act, act, (None, None), None, (None, None))
    assert routing is None
    return out


def test_forward_is_the_written_formula(block):
    x, act = torch.randn(3, 5, D, dtype=torch.double), torch.randn(3, D, dtype=torch.double)
    scale1, gate1, scale2, gate2 = (
        part[:, None] for part in (act @ block.modulation.weight.T + block.modulation.bias).split(D, dim=-1)
    )
    assert (gate1.abs() > 2).any()
    middle = x + torch.tanh(gate1.clamp(-2, 2)) * 3.0 * layer_norm(x) * (1 + scale1)
    want = middle + torch.tanh(gate2.clamp(-2, 2)) * -2.0 * layer_norm(middle) * (1 + scale2)
    torch.testing.assert_close(run(block, x, act), want, rtol=1e-9, atol=1e-9)


def test_modulation_scales_and_never_shifts(block):
    """A token that LayerNorm maps to zero stays zero whatever the modulation; scale -1 removes every token."""
    act = torch.randn(1, D, dtype=torch.double)
    constant = torch.full((1, 4, D), 7.0, dtype=torch.double)
    torch.testing.assert_close(run(block, constant, act), constant, rtol=0, atol=1e-12)
    assert block.attention.seen.abs().max() < 1e-12
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias[:D] = -1.0
        block.modulation.bias[2 * D : 3 * D] = -1.0
    x = torch.randn(1, 4, D, dtype=torch.double)
    assert torch.equal(run(block, x, act), x)


@pytest.mark.parametrize(
    ("gate", "effective"), [(2.0, 2.0), (50.0, 2.0), (-50.0, -2.0), (0.5, 0.5), (0.0, 0.0)]
)
def test_gates_are_clamped_at_two_before_tanh(block, gate, effective):
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()
        block.modulation.bias[D : 2 * D] = gate
    x = torch.randn(2, 4, D, dtype=torch.double)
    act = torch.randn(2, D, dtype=torch.double)
    want = x + torch.tanh(torch.tensor(effective, dtype=torch.double)) * 3.0 * layer_norm(x)
    torch.testing.assert_close(run(block, x, act), want, rtol=1e-9, atol=1e-9)


def test_a_moe_block_judges_the_unmodulated_norm():
    moe_block = TransformerBlock(SHAPE, 1, resolve_kernels()).double()
    seen = {}

    class Spy(nn.Module):
        def forward(self, modulated, plain, temb):
            seen.update(modulated=modulated, plain=plain, temb=temb)
            return torch.zeros_like(modulated), "routing"

    moe_block.attention, moe_block.moe = Times(0.0), Spy()
    with torch.no_grad():
        moe_block.modulation.weight.zero_()
        moe_block.modulation.bias.zero_()
        moe_block.modulation.bias[2 * D : 3 * D] = torch.linspace(0, 5, D)
    x, temb, act = (torch.randn(*s, D, dtype=torch.double) for s in ((2, 4), (2,), (2,)))
    _, routing = moe_block(x, temb, act, (None, None), None, (None, None))
    assert routing == "routing"
    torch.testing.assert_close(seen["plain"], layer_norm(x), rtol=1e-9, atol=1e-9)
    want = layer_norm(x) * (1 + torch.linspace(0, 5, D).double())
    torch.testing.assert_close(seen["modulated"], want, rtol=1e-9, atol=1e-9)
    assert seen["temb"] is temb


def routed_over_time(decoupled: bool):
    """Logits [10, 16, E] of one image at ten times, and the block; the hand-set modulation is 1 + scale2 = time.

    Attention is switched off and the time embedding is zero: nothing but the modulation knows the time.
    """
    shape = dataclasses.replace(SHAPE, decoupled_routing=decoupled)
    block = TransformerBlock(shape, 1, resolve_kernels()).double()
    block.attention = Times(0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.moe.parameters():
            parameter.normal_(0, 0.1, generator=generator)
        block.modulation.weight.zero_()
        block.modulation.bias.fill_(0.5)
        block.modulation.bias[2 * D : 3 * D] = -1.0
        block.modulation.weight[2 * D : 3 * D, 0] = 1.0
    act = torch.zeros(10, D, dtype=torch.double)
    act[:, 0] = TIMES
    x = torch.randn(1, 16, D, dtype=torch.double, generator=generator).expand(10, -1, -1)
    out, routing = block(x, torch.zeros(10, D, dtype=torch.double), act, (None, None), None, (None, None))
    return out, routing, block


def test_logit_spread_follows_the_modulation_where_routing_is_coupled_and_not_where_it_is_decoupled():
    """A modulation that grows 10x over time: the reason for decoupled routing, as a number."""
    spreads, choices = {}, {}
    for decoupled in (True, False):
        _, routing, _ = routed_over_time(decoupled)
        spreads[decoupled] = routing.logits_BSE.double().std(dim=(1, 2))
        choices[decoupled] = routing.weight_BEC.double()
    torch.testing.assert_close(spreads[True], spreads[True][:1].expand(10), rtol=1e-6, atol=0)
    torch.testing.assert_close(spreads[False], spreads[False][0] * TIMES, rtol=1e-6, atol=0)
    torch.testing.assert_close(spreads[False][:1], spreads[True][:1], rtol=1e-6, atol=0)
    # What the experts' outputs count for drifts with the noise level alone.
    assert (choices[True] - choices[True][:1]).abs().max() < 1e-6
    assert (choices[False] - choices[False][:1]).abs().max() > 0.1


@pytest.mark.parametrize("decoupled", [True, False])
def test_gradient_flows_to_the_router_and_through_coupled_logits_to_the_modulation(decoupled):
    out, routing, block = routed_over_time(decoupled)
    scale2 = slice(2 * D, 3 * D)
    gradients = torch.autograd.grad(
        out.square().mean(), [block.moe.router.weight, block.modulation.weight], retain_graph=True
    )
    assert gradients[0].abs().max() > 0
    assert gradients[1][scale2, 0].abs().max() > 0  # through the experts, either way
    router, modulation = torch.autograd.grad(
        routing.logits_BSE.square().mean(),
        [block.moe.router.weight, block.modulation.weight],
        allow_unused=True,
    )
    assert router[:, D:].abs().max() > 0
    if decoupled:
        assert modulation is None or modulation[scale2].count_nonzero() == 0
    else:
        assert modulation[scale2, 0].abs().max() > 0


def test_coupled_routing_has_the_same_parameters():
    coupled = TransformerBlock(dataclasses.replace(SHAPE, decoupled_routing=False), 1, resolve_kernels())
    decoupled = TransformerBlock(SHAPE, 1, resolve_kernels())
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in (coupled, decoupled)]
    assert shapes[0] == shapes[1]
