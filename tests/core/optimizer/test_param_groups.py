"""The optimizer table: every parameter has one row, and tensors split into the forward pass's matrices."""

import pytest
import torch
from torch import nn

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.optimizer import param_groups
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.optimizer.param_groups import SPLITS, assign, parse_lr_factors, rule_of
from megatron_nucleus.utils.errors import ConfigError


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return NucleusTransformer(PRESETS["nucleus_image_17b"])


def test_every_parameter_of_the_published_model_has_exactly_one_row(published):
    rows = assign(published)
    unused = {n for n, p in published.named_parameters() if not p.requires_grad}
    assert unused == {f"blocks.{i}.attention.text_q_norm.weight" for i in range(32)}
    assert {n for n, _, _ in rows} | unused == {n for n, _ in published.named_parameters()}
    used = {rule.pattern for _, _, rule in rows}
    assert used == {rule.pattern for rule in param_groups.TABLE}, "a row of the table matches nothing"


def test_published_split_between_the_optimizers(published):
    optimizer = build_optimizer(published, OptimizerConfig())
    rows = {row["group"]: row for row in optimizer.summary()}
    muon = {group for group, row in rows.items() if row["optimizer"] == "muon"}
    assert muon == {"attention", "experts", "shared_expert", "dense_ffn", "text_in"}
    assert rows["experts"]["parameters"] == 15_325_986_816  # the published count of routed experts
    assert rows["experts"]["matrices"] == 29 * 64 * 3
    assert rows["shared_expert"]["matrices"] == 29 * 3
    assert rows["dense_ffn"]["matrices"] == 3 * 3
    assert rows["attention"]["matrices"] == 32 * 6
    trainable = sum(p.numel() for p in published.parameters() if p.requires_grad)
    assert sum(row["parameters"] for row in rows.values()) == trainable


def test_norms_and_biases_do_not_decay(published):
    for name, param, rule in assign(published):
        assert rule.decay == (param.ndim > 1), name


def test_splits_are_the_matrices_that_multiply_tokens():
    E, D, F = 3, 4, 5
    gate_up = torch.randn(E, D, 2 * F)
    stack = SPLITS["per expert, gate|up columns"](gate_up)
    assert stack.shape == (E, 2, D, F) == param_groups.matrices("per expert, gate|up columns", gate_up.shape)
    x = torch.randn(7, D)
    for e in range(E):
        gate, up = (x @ gate_up[e]).chunk(2, dim=-1)
        torch.testing.assert_close(x @ stack[e, 0], gate)
        torch.testing.assert_close(x @ stack[e, 1], up)
    rows = torch.randn(2 * F, D)
    gate, up = (x @ rows.T).chunk(2, dim=-1)
    torch.testing.assert_close(x @ SPLITS["gate|up rows"](rows)[0].T, gate)
    torch.testing.assert_close(x @ SPLITS["gate|up rows"](rows)[1].T, up)


def test_splits_are_views_so_that_updates_reach_the_parameter():
    for name, shape in {
        "whole": (2, 3),
        "gate|up rows": (4, 3),
        "per expert": (2, 3, 4),
        "per expert, gate|up columns": (2, 3, 4),
    }.items():
        tensor = torch.zeros(shape)
        SPLITS[name](tensor).fill_(1.0)
        assert bool((tensor == 1).all()), name


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attention.gate.weight",
        "blocks.x.attention.q.weight",
        "image_in.weights",
        "blocks.1.moe.experts.gate_up.weight",
    ],
)
def test_unknown_parameter_is_named(name):
    with pytest.raises(ConfigError, match=name):
        rule_of(name)


def test_unknown_parameter_stops_the_build_unless_it_is_frozen():
    model = nn.Module()
    model.adapter = nn.Linear(2, 2, bias=False)
    with pytest.raises(ConfigError, match=r"adapter\.weight"):
        build_optimizer(model, OptimizerConfig())
    model.adapter.weight.requires_grad_(False)
    assert build_optimizer(model, OptimizerConfig()).tensors() == {}


def test_lr_factors():
    assert parse_lr_factors(()) == {}
    assert parse_lr_factors(("router=0.5", "experts=2")) == {"router": 0.5, "experts": 2.0}
    for item, message in {
        "ruoter=0.5": "did you mean router",
        "router": "GROUP=FACTOR",
        "router=fast": "fast",
        "router=-1": ">= 0",
        "router=nan": ">= 0",
        "router=inf": ">= 0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_lr_factors((item,))
    with pytest.raises(ConfigError, match="twice"):
        parse_lr_factors(("router=1", "router=2"))
