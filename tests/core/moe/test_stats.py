"""Routing figures against plain loops over every token, hand-made routings, and sums over parts and ranks."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.moe.agreement import AgreementMeter
from megatron_nucleus.core.moe.stats import (
    SCALARS,
    RoutingMeter,
    taken_mask,
)
from megatron_nucleus.types import Routing
from tests.core.moe.random_routing import routing
from tests.ranks import run_ranks

E, BINS, CELLS = 5, 4, 2


def batch(B=6, grid=(3, 4), C=4, seed=0, layers=2):
    sigma = torch.rand(B, generator=torch.Generator().manual_seed(seed + 99))
    return [routing(B, grid[0] * grid[1], C, seed + i) for i in range(layers)], sigma, grid


def reference(batches, layer):
    """The same figures, one token at a time. batches: (routings, sigma, grid, weights)."""
    picked, rows, mass = [], [[] for _ in range(E)], [0.0] * E
    by_bin, by_cell = [[0.0] * BINS for _ in range(E)], [[0.0] * CELLS**2 for _ in range(E)]
    tokens_bin, tokens_cell = [0] * BINS, [0] * CELLS**2
    logits = [[[] for _ in range(BINS)] for _ in range(E)]
    ends = {"low": [], "high": []}
    for routings, sigma, (h, w), weights in batches:
        r = routings[layer]
        for b in range(len(sigma)):
            if weights is not None and weights[b] == 0:
                continue
            k = min(int(float(sigma[b]) * BINS), BINS - 1)
            count = [0] * (h * w)
            for e in range(E):
                rows[e].append(len(set(r.index_BEC[b, e].tolist())))
                for token, weight in zip(
                    r.index_BEC[b, e].tolist(), r.weight_BEC[b, e].tolist(), strict=True
                ):
                    count[token] += 1
                    mass[e] += weight
                    by_bin[e][k] += weight
                    by_cell[e][(token // w * CELLS // h) * CELLS + token % w * CELLS // w] += weight
            picked += count
            for token in range(h * w):
                tokens_bin[k] += 1
                tokens_cell[(token // w * CELLS // h) * CELLS + token % w * CELLS // w] += 1
                values = r.logits_BSE[b, token].double()
                values = (values - values.mean()).tolist()
                for e in range(E):
                    logits[e][k].append(values[e])
                if sigma[b] < 0.3:
                    ends["low"] += values
                if sigma[b] > 0.7:
                    ends["high"] += values

    def entropy(mass, tokens):
        used = [i for i, n in enumerate(tokens) if n]
        rates = [mass[i] / tokens[i] for i in used]
        return -sum(r / sum(rates) * math.log(r / sum(rates)) for r in rates if r) / math.log(len(used))

    def explained(groups):
        every = [x for group in groups for x in group]
        mean = sum(every) / len(every)
        between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups if g)
        return between / sum((x - mean) ** 2 for x in every)

    def spread(values):
        return math.sqrt(sum(x * x for x in values) / len(values)) if values else None

    low, high = spread(ends["low"]), spread(ends["high"])
    means = [sum(r) / len(r) for r in rows]
    return {
        "taken_by_none": picked.count(0) / len(picked),
        "taken_by_one": picked.count(1) / len(picked),
        "experts_per_token": sum(picked) / len(picked),
        "tokens_per_expert_min": min(means),
        "tokens_per_expert_max": max(means),
        "least_mass": min(mass) / sum(mass) * E,
        "time_entropy": sum(entropy(by_bin[e], tokens_bin) for e in range(E)) / E,
        "space_entropy": sum(entropy(by_cell[e], tokens_cell) for e in range(E)) / E,
        "sigma_explained": sum(explained(logits[e]) for e in range(E)) / E,
        "spread": spread([x for groups in logits for group in groups for x in group]),
        "spread_low": low,
        "spread_high": high,
        "spread_ratio": low / high,
    }, [picked.count(n) / len(picked) for n in range(E + 1)], [m / sum(mass) for m in mass]  # fmt: skip


def meter(layers=(1, 3), experts=E):
    return RoutingMeter(layers, experts, sigma_bins=BINS, space_cells=CELLS)


@pytest.mark.parametrize("padded", [False, True])
def test_every_figure_against_a_loop_over_tokens(padded):
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0]) if padded else None
    batches = [
        (*batch(seed=1), weights),
        (*batch(grid=(5, 2), C=3, seed=20), None),
        (*batch(grid=(1, 7), C=2, seed=40), weights),  # one row: half of the regions stay empty
    ]
    ours = meter()
    for part in batches:
        ours.add(*part)
    report = ours.report(ours.sums())
    counted = [6 if w is None else int(w.sum()) for *_, w in batches]
    assert report.images == sum(counted)
    assert report.tokens == counted[0] * 12 + counted[1] * 10 + counted[2] * 7
    for i, layer in enumerate(report.layers):
        numbers, histogram, mass = reference(batches, i)
        assert set(numbers) == set(SCALARS)
        assert {name: getattr(layer, name) for name in SCALARS} == pytest.approx(numbers, rel=1e-5)
        assert layer.experts_per_token_shares == pytest.approx(histogram, rel=1e-12)
        assert layer.expert_mass == pytest.approx(mass, rel=1e-6)
    assert [layer.layer for layer in report.layers] == [1, 3]
    for name in SCALARS:
        assert report.mean[name] == pytest.approx(sum(getattr(x, name) for x in report.layers) / 2)
    assert json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))["images"] == report.images
    tags = report.scalars()
    assert tags["layer_03/taken_by_none"] == report.layers[1].taken_by_none
    assert tags["mean/sigma_explained"] == report.mean["sigma_explained"]


def test_all_experts_take_the_same_tokens():
    index = torch.arange(3).expand(2, E, 3)
    same = Routing(index, torch.full((2, E, 3), 2.5 / E), torch.zeros(2, 12, E))
    ours = meter((0,))
    ours.add([same], torch.tensor([0.1, 0.9]), (3, 4))
    layer = ours.report(ours.sums()).layers[0]
    assert layer.taken_by_none == 0.75
    assert layer.taken_by_one == 0
    assert layer.experts_per_token_shares == (0.75, 0, 0, 0, 0, 0.25)
    assert layer.tokens_per_expert_min == layer.tokens_per_expert_max == 3
    assert layer.least_mass == pytest.approx(1)
    assert layer.dead_experts == ()
    assert layer.time_entropy == pytest.approx(1)
    # three tokens of the first row of 3x4, regions 2x2: two left, one right
    left, right = 2 / 4, 1 / 4  # per token of the upper regions, which have 2 rows x 2 columns each
    share = left / (left + right)
    want = -(share * math.log(share) + (1 - share) * math.log(1 - share)) / math.log(4)
    assert layer.space_entropy == pytest.approx(want)
    assert layer.sigma_explained is None  # logits without any variance


def test_an_expert_that_works_at_one_time_and_place():
    """Expert 0 counts only at low noise and in one corner."""
    index = torch.tensor([[[0]], [[0]]]).expand(2, 2, 1).clone()
    weight = torch.tensor([[[1.0], [1.0]], [[0.0], [1.0]]])
    ours = RoutingMeter((0,), 2, sigma_bins=BINS, space_cells=CELLS)
    ours.add([Routing(index, weight, torch.zeros(2, 4, 2))], torch.tensor([0.1, 0.9]), (2, 2))
    layer = ours.report(ours.sums()).layers[0]
    assert layer.time_entropy == pytest.approx(0.5)  # (0 of expert 0 + 1 of expert 1) / 2
    assert layer.space_entropy == pytest.approx(0)


def test_a_duplicate_choice_shows():
    """The invariant of expert choice, C distinct tokens per expert, is measured and not assumed."""
    broken, sigma, grid = batch(layers=1)
    broken[0].index_BEC[:, 2, 1] = broken[0].index_BEC[:, 2, 0]
    ours = meter((0,))
    ours.add(broken, sigma, grid)
    layer = ours.report(ours.sums()).layers[0]
    assert (layer.tokens_per_expert_min, layer.tokens_per_expert_max) == (3, 4)


@pytest.mark.parametrize(("pure", "low", "high"), [(True, 1 - 1e-9, 1 + 1e-9), (False, 0.0, 0.01)])
def test_variance_explained_by_sigma(pure, low, high):
    B, S = 64, 16
    sigma = (torch.arange(B) % BINS + 0.5) / BINS
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(E, generator=generator)
    driven = (sigma[:, None, None] * direction).expand(B, S, E)
    free = torch.randn(B, S, E, generator=generator)
    ours = meter((0,))
    logits = driven if pure else free
    ours.add([routing(B, S, 3, 0)._replace(logits_BSE=logits)], sigma, (4, 4))
    report = ours.report(ours.sums())
    assert low <= report.layers[0].sigma_explained <= high
    assert report.sigma_explained_chance == pytest.approx((BINS - 1) / (B - 1))


def test_what_is_common_to_all_experts_of_a_token_does_not_count():
    routings, sigma, grid = batch(B=12)
    shift = torch.linspace(0, 50, 12).view(12, 1, 1)
    figures = []
    for parts in (routings, [r._replace(logits_BSE=r.logits_BSE + shift) for r in routings]):
        ours = meter()
        ours.add(parts, sigma, grid)
        figures.append(ours.report(ours.sums()).mean)
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_chance_is_what_unrelated_images_give():
    """Logits that differ between images and know nothing of sigma: the mean over many draws is the stated value."""
    B, found = 20, []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(B, 1, E, generator=generator).expand(B, 4, E)
        sigma = ((torch.randperm(B, generator=generator) % BINS) + 0.5) / BINS
        ours = meter((0,))
        ours.add([routing(B, 4, 2, seed)._replace(logits_BSE=logits)], sigma, (2, 2))
        report = ours.report(ours.sums())
        found.append(report.layers[0].sigma_explained)
    assert sum(found) / len(found) == pytest.approx(report.sigma_explained_chance, abs=0.015)


def test_logit_spread_at_both_ends():
    B, S = 40, 9
    sigma = torch.linspace(0.02, 0.98, B)
    scale = torch.where(sigma < 0.3, 3.0, torch.where(sigma > 0.7, 1.5, 100.0))
    logits = torch.tensor([1.0, -1.0]).expand(B, S, 2) * scale.view(B, 1, 1)
    ours = RoutingMeter((0,), 2)
    ours.add([routing(B, S, 2, 0, experts=2)._replace(logits_BSE=logits)], sigma, (3, 3))
    layer = ours.report(ours.sums()).layers[0]
    assert (layer.spread_low, layer.spread_high, layer.spread_ratio) == pytest.approx((3.0, 1.5, 2.0))
    only = RoutingMeter((0,), 2)
    only.add([routing(2, S, 2, 0, experts=2)], torch.tensor([0.5, 0.5]), (3, 3))
    report = only.report(only.sums())
    assert report.layers[0].spread_low is None
    assert report.mean["spread_ratio"] is None
    assert report.layers[0].time_entropy is None  # one bin says nothing about time
    assert report.layers[0].sigma_explained is None
    assert "mean/spread_ratio" not in report.scalars()


def test_dead_experts_are_named():
    routings, sigma, grid = batch(layers=1)
    weight = routings[0].weight_BEC.clone()
    weight[:, 3] *= 1e-4
    ours = meter((7,))
    ours.add([routings[0]._replace(weight_BEC=weight)], sigma, grid)
    report = ours.report(ours.sums())
    assert report.layers[0].dead_experts == (3,)
    assert report.dead_experts == 1
    assert report.layers[0].least_mass == pytest.approx(min(report.layers[0].expert_mass) * E)
    assert report.layers[0].least_mass < 0.01


def test_an_expert_without_any_weight_has_no_entropy():
    routings, sigma, grid = batch(layers=1)
    weight = routings[0].weight_BEC.clone()
    weight[:, 0] = 0
    ours, without = meter((0,)), RoutingMeter((0,), E - 1, sigma_bins=BINS, space_cells=CELLS)
    ours.add([routings[0]._replace(weight_BEC=weight)], sigma, grid)
    rest = Routing(*(x[:, 1:] for x in routings[0][:2]), routings[0].logits_BSE[..., 1:])
    without.add([rest], sigma, grid)
    a, b = ours.report(ours.sums()).layers[0], without.report(without.sums()).layers[0]
    assert a.time_entropy == pytest.approx(b.time_entropy)
    assert a.dead_experts == (0,)


def test_sums_over_halves_are_the_whole_and_reset_forgets():
    routings, sigma, grid = batch(B=8)
    whole, part = meter(), meter()
    whole.add(routings, sigma, grid)
    total = torch.zeros_like(whole.sums())
    for half in (slice(0, 3), slice(3, 8)):
        part.reset()
        part.add([Routing(*(x[half] for x in r)) for r in routings], sigma[half], grid)
        total += part.sums()
    torch.testing.assert_close(total, whole.sums(), rtol=1e-12, atol=1e-12)
    part.reset()
    assert not part.sums().any()
    with pytest.raises(ValueError, match="no image"):
        part.report(part.sums())


def rank_sums(images):
    """Each rank adds its own images; the sum of all, as rank 0 sees it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    routings, sigma, grid = batch(B=images)
    own = slice(rank, None, world)
    ours, agreement = meter(), AgreementMeter((1, 3), (0.1, 0.9))
    mine = [Routing(*(x[own] for x in r)) for r in routings]
    ours.add(mine, sigma[own], grid)
    agreement.add([mine, mine[::-1]])
    totals = []
    for sums in (ours.sums(), agreement.sums()):
        dist.all_reduce(sums)
        totals.append(sums.tolist())
    return totals


@pytest.mark.dist
def test_two_ranks_summed_are_one(tmp_path):
    routings, sigma, grid = batch(B=7)
    ours, agreement = meter(), AgreementMeter((1, 3), (0.1, 0.9))
    ours.add(routings, sigma, grid)
    agreement.add([routings, routings[::-1]])
    for totals in run_ranks(2, rank_sums, tmp_path, 7):
        assert totals[0] == pytest.approx(ours.sums().tolist(), rel=1e-12, abs=1e-12)
        assert totals[1] == pytest.approx(agreement.sums().tolist(), rel=1e-12)


def test_numbers_that_are_not_finite_become_none():
    routings, sigma, grid = batch(layers=1)
    bad = routings[0]._replace(logits_BSE=routings[0].logits_BSE * float("nan"))
    ours = meter((0,))
    ours.add([bad], sigma, grid)
    report = ours.report(ours.sums())
    assert report.layers[0].spread is None
    assert report.layers[0].sigma_explained is None
    assert report.layers[0].experts_per_token == pytest.approx(4 * E / 12)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_adding_keeps_no_graph():
    routings, sigma, grid = batch(layers=1)
    logits = routings[0].logits_BSE.requires_grad_()
    ours = meter((0,))
    ours.add([routings[0]._replace(logits_BSE=logits)], sigma, grid)
    assert not ours.sums().requires_grad


def test_wrong_sizes_are_refused():
    routings, sigma, grid = batch()
    with pytest.raises(ValueError, match=r"2 routings for the 1 layers \[1\]"):
        meter((1,)).add(routings, sigma, grid)
    with pytest.raises(ValueError, match="for grid"):
        meter().add(routings, sigma, (4, 4))
    with pytest.raises(ValueError, match="sums of shape"):
        meter().report(meter((1,)).sums())
    with pytest.raises(ValueError, match="two noise levels"):
        AgreementMeter((1,), (0.5,))
    with pytest.raises(ValueError, match="1 noise levels for 2"):
        AgreementMeter((1, 3), (0.1, 0.9)).add([routings])


def test_taken_mask():
    index = torch.tensor([[[0, 2], [3, 2]]])
    want = [[[True, False, True, False], [False, False, True, True]]]
    assert taken_mask(index, 4).tolist() == want
