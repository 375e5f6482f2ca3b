"""Agreement of choices between noise levels, set by set."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megatron_nucleus.core.moe.agreement import AgreementMeter, choice_agreement
from megatron_nucleus.types import Routing
from tests.core.moe.random_routing import routing


def common(a, b):
    """Mean share of common tokens, set by set."""
    B, experts, C = a.shape
    shares = [
        len(set(a[i, e].tolist()) & set(b[i, e].tolist())) / C for i in range(B) for e in range(experts)
    ]
    return sum(shares) / len(shares)


def test_choice_agreement_against_sets():
    a, b = routing(4, 12, 5, 1).index_BEC, routing(4, 12, 5, 2).index_BEC
    got = choice_agreement(a, b, 12)
    assert float(got.share) == pytest.approx(common(a, b))
    assert got.chance == 5 / 12
    assert float(choice_agreement(a, a.flip(2), 12).share) == 1
    assert float(choice_agreement(a * 0 + torch.arange(5), a * 0 + torch.arange(5, 10), 12).share) == 0


def test_choices_at_random_agree_by_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 200, 4, 20, generator=generator).topk(6, dim=-1).indices
    assert float(choice_agreement(a, b, 20).share) == pytest.approx(6 / 20, abs=0.01)


def test_agreement_over_levels():
    levels = (0.1, 0.5, 0.9)
    by_level = [[routing(3, 12, 4, 10 * j + i) for i in range(2)] for j in range(3)]
    weights = torch.tensor([1.0, 1.0, 0.0])
    ours = AgreementMeter((1, 3), levels)
    ours.add(by_level, weights)
    ours.add([[Routing(*(x[:1] for x in r)) for r in level] for level in by_level])
    report = ours.report(ours.sums())
    assert report.images == 3
    assert report.levels == levels
    pick = [0, 1, 0]
    for i, layer in enumerate(report.layers):
        index = [by_level[j][i].index_BEC[pick] for j in range(3)]
        assert layer.neighbours == pytest.approx((common(index[0], index[1]), common(index[1], index[2])))
        assert layer.ends == pytest.approx(common(index[0], index[2]))
        assert layer.chance == pytest.approx(4 / 12)
    assert report.mean.ends == pytest.approx(sum(x.ends for x in report.layers) / 2)
    assert report.mean.neighbours[1] == pytest.approx(sum(x.neighbours[1] for x in report.layers) / 2)
    json.dumps(dataclasses.asdict(report), allow_nan=False)
