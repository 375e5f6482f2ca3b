"""Text keys and values: both orders of multiplication are one function, with one gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_nucleus.core.transformer import text
from megatron_nucleus.core.transformer.text import product_pays, project

U, D, M = 12, 8, 6


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, U), (U,), (D, U), (D,), (M, D)]
    return [torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in shapes]


def written_out(features, norm, weight, bias, rows):
    return F.linear(F.linear(features * norm, weight, bias), rows)


@pytest.mark.parametrize("product", [False, True])
def test_equals_the_two_maps_written_out(product, monkeypatch):
    monkeypatch.setattr(text, "product_pays", lambda *args: product)
    args = inputs(5)
    got, expected = project(*args), written_out(*args)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, args, grad), torch.autograd.grad(expected, args, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 7, 30, 1000])
def test_the_way_taken_is_the_one_with_fewer_flops(tokens, monkeypatch):
    """Counted over forward and backward; the features need no gradient, as those of a frozen encoder."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(product: bool) -> int:
        monkeypatch.setattr(text, "product_pays", lambda *args: product)
        features, *weights = inputs(tokens)
        features = features.detach()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(project(features, *weights).sum(), weights)
        return counter.get_total_flops()

    assert product_pays(2 * tokens, U, D, M) == (count(True) < count(False))


def test_published_model_multiplies_first_from_1755_text_tokens_on():
    assert not product_pays(1755, 4096, 2048, 1024)
    assert product_pays(1756, 4096, 2048, 1024)


def test_a_frozen_encoder_gets_no_gradient_work():
    features, *weights = inputs(50)
    features = features.detach()
    out = project(features, *weights)
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        seen.add(node)
        todo += [n for n, _ in node.next_functions if n is not None and n not in seen]
    shapes = {tuple(n.variable.shape) for n in seen if hasattr(n, "variable")}
    assert shapes == {(U,), (D, U), (D,), (M, D)}
