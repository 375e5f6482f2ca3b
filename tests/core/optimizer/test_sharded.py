"""The optimizer over ranks equals the optimizer of one process: every grid of ranks, both precisions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nucleus.core.optimizer.exchange import STAGES
from megatron_nucleus.core.optimizer.muon import newton_schulz_flops
from megatron_nucleus.core.optimizer.muon_reference import muon_update
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.optimizer.param_groups import SPLITS, matrices, rule_of
from megatron_nucleus.core.parallel_state import Layout, make_layout
from tests.core.optimizer.sharded_runs import (
    CASES,
    CONFIG,
    DTYPES,
    EXPERTS,
    FROZEN,
    GRIDS,
    LOW_PRECISION,
    LR,
    MAX_NORM,
    SHAPES,
    STEPS,
    all_grids,
    full_values,
    new_model,
    parameter_of,
    part_of,
    train,
    two_ranks,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """{(world, replicate, ep, dtype): one result per rank}."""
    found = {}
    for world in GRIDS:
        ranks = run_ranks(world, all_grids, tmp_path_factory.mktemp(f"world{world}"), world)
        found |= {(world, *case): [rank[case] for rank in ranks] for case in ranks[0]}
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    return run_ranks(2, two_ranks, tmp_path_factory.mktemp("pair"))


def one_process(dtype: torch.dtype, config: OptimizerConfig = CONFIG) -> dict:
    model = new_model(dtype)
    optimizer = build_optimizer(model, config)
    norms = train(model, optimizer, dtype)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {"norms": norms, "weights": weights, "state": optimizer.tensors(), "summary": optimizer.summary()}


@pytest.fixture(scope="module")
def expected() -> dict:
    return {name: one_process(dtype) for name, dtype in DTYPES.items()}


def reference(dtype: torch.dtype, norms: list[float]) -> dict[str, Tensor]:
    """Weights of the matrices under Muon after training, one matrix at a time in plain code."""
    weights = {}
    for name in SHAPES:
        rule = rule_of(name)
        if rule.optimizer != "muon":
            continue
        factor = {"attention": 0.5, "experts": 2.0}.get(rule.group, 1.0)
        weight = full_values(name, 0, dtype)
        momentum = torch.zeros_like(weight)
        for step, norm in enumerate(norms, start=1):
            gradient = full_values(name, step, dtype) * min(1.0, MAX_NORM / (norm + 1e-6))
            views = [SPLITS[rule.split](t) for t in (weight, gradient, momentum)]
            for index in itertools.product(*map(range, views[0].shape[:-2])):
                w, g, m = (view[index] for view in views)
                new_w, new_m = muon_update(w, g, m, LR * step * factor, weight_decay=CONFIG.weight_decay)
                w.copy_(new_w)
                m.copy_(new_m)
        weights[name] = weight
    return weights


def relative(value: np.ndarray, target: Tensor) -> float:
    """L2 norm of the difference over that of the target; 0 for two empty ones."""
    difference = torch.from_numpy(value).double() - target.double()
    return float(difference.norm() / target.double().norm().clamp_min(1e-30))


def layout_of(case: tuple) -> Layout:
    world, replicate, ep, _ = case
    return make_layout(world, experts=EXPERTS, ep=ep, replicate=replicate)


each_case = pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])


@each_case
def test_equals_one_process(case, results, expected):
    target, limit = expected[case[-1]], {"float32": 1e-6, "float64": 1e-12}[case[-1]]
    for rank, result in enumerate(results[case]):
        for kind in ("weights", "state"):
            assert result[kind].keys() == target[kind].keys()
            for name, value in result[kind].items():
                parameter = name if kind == "weights" else parameter_of(name)
                part = part_of(target[kind][name], parameter, layout_of(case), rank)
                assert value.shape == part.shape, name
                assert relative(value, part) < limit, (rank, name)
    assert results[case][0]["summary"] == target["summary"]
    for name, weight in target["weights"].items():
        moved = relative(weight.numpy(), full_values(name, 0, weight.dtype))
        assert moved == 0.0 if name == FROZEN else moved > 1e-3, name


@each_case
def test_equals_one_matrix_at_a_time(case, results, expected):
    limit = {"float32": 1e-6, "float64": 1e-9}[case[-1]]
    weights = reference(DTYPES[case[-1]], expected[case[-1]]["norms"])
    assert len(weights) == 9
    for rank, result in enumerate(results[case]):
        for name, weight in weights.items():
            part = part_of(weight, name, layout_of(case), rank)
            assert relative(result["weights"][name], part) < limit, (rank, name)


@each_case
def test_copies_stay_the_same_bits(case, results):
    layout = layout_of(case)
    for rank, result in enumerate(results[case]):
        for name, value in result["weights"].items():
            axis = "expert_replicate" if ".experts." in name else "replicate"
            first = results[case][layout.group(axis, rank)[0]]
            assert np.array_equal(value, first["weights"][name]), name


@each_case
def test_every_parameter_counts_once_in_the_norm(case, results, expected):
    full = [full_values(name, 1, DTYPES[case[-1]]).double() for name in SHAPES if name != FROZEN]
    square = sum(float(g.square().sum()) for g in full)
    assert sum(result["share"] for result in results[case]) == pytest.approx(square, rel=1e-12)
    for result in results[case]:
        assert result["norms"] == pytest.approx(expected[case[-1]]["norms"], rel=1e-7)
        assert result["norms"] == results[case][0]["norms"], "all ranks clip alike"


@each_case
def test_every_cut_matrix_has_one_owner_and_owners_equal_work(case, results):
    cut = results[case][0]["cut"]
    dense = [name for name in SHAPES if rule_of(name).optimizer == "muon" and ".experts." not in name]
    assert cut == ([] if case[0] == 1 else dense)
    assert sorted(itertools.chain(*(result["owned"] for result in results[case]))) == sorted(cut)
    costs = {
        n: newton_schulz_flops(matrices(rule_of(n).split, SHAPES[n]), CONFIG.muon_num_ns_steps) for n in cut
    }
    loads = [sum(costs[name] for name in result["owned"]) for result in results[case]]
    assert max(loads) <= sum(loads) / len(loads) + max(costs.values(), default=0)


@each_case
def test_traffic_is_what_the_collectives_are_given(case, results):
    world, replicate, *_ = case
    for result in results[case]:
        gather, back, copies = (result["traffic"][stage] for stage in STAGES)
        step = [("all-to-all", gather), ("all-to-all", back)] if world > replicate else []
        step += [("all-gather", copies)] if replicate > 1 else []
        assert result["sent"] == step * STEPS


@each_case
def test_a_step_runs_no_operation_on_distributed_tensors(case, results):
    assert all(result["dispatched"] == [] for result in results[case])


def test_traffic_by_hand(pair):
    """q [16, 8] is more work than k [5, 12]: rank 0 owns q, rank 1 owns k. Rank 0 holds 3 rows of k, rank 1 two."""
    half_of_q, row_of_k = 8 * 8 * 4, 12 * 4  # bytes
    rank_0, rank_1 = (result["traffic"] for result in pair)
    assert rank_0[1] == {"gather": 3 * row_of_k, "return": half_of_q, "replicate": 0}
    assert rank_1[1] == {"gather": half_of_q, "return": 3 * row_of_k, "replicate": 0}
    padded = {"gather": 0, "return": 0, "replicate": 2 * half_of_q}  # copies: k is padded to the length of q
    assert rank_0[2] == rank_1[2] == padded


def test_bad_input_is_named_on_every_rank(pair):
    for result in pair:
        missing, by_columns = result["errors"]
        assert "blocks.1.moe.router.weight" in missing
        assert "no gradient" in missing
        assert "blocks.0.attention.q.weight" in by_columns
        assert "Shard(dim=1)" in by_columns


def test_bf16_halves_the_traffic_and_points_the_same_way(pair, results):
    case = (2, 1, 2, "float32")
    target = one_process(torch.float32, LOW_PRECISION)["weights"]
    for rank, result in enumerate(pair):
        full = results[case][rank]["traffic"]
        assert {stage: 2 * sent for stage, sent in result["bf16"]["traffic"].items()} == full
        for name, value in result["bf16"]["weights"].items():
            assert relative(value, part_of(target[name], name, layout_of(case), rank)) < 1e-4, name
