"""bf16 weights and state: unbiased updates, exact resume, the same bits however a parameter is cut."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.optimizer import adamw as adamw_module
from megatron_nucleus.core.optimizer import muon as muon_module
from megatron_nucleus.core.optimizer import optimizer as optimizer_module
from megatron_nucleus.core.optimizer import rounding
from megatron_nucleus.core.optimizer.adamw import AdamW, AdamWParam
from megatron_nucleus.core.optimizer.clip import clip_gradients
from megatron_nucleus.core.optimizer.muon import Muon, MuonParam
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.optimizer.param_groups import FP32_GROUPS, rule_of
from megatron_nucleus.core.optimizer.rounding import Rounding
from megatron_nucleus.core.parallel_state import make_layout
from megatron_nucleus.ops import stochastic_round as stochastic_round_module
from megatron_nucleus.utils.errors import ConfigError
from tests.core.optimizer.sharded_runs import (
    EXPERTS,
    LR,
    new_model,
    part_of,
    shard,
    train,
)
from tests.ranks import run_ranks

BF16 = torch.bfloat16
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
MUON = {"momentum": 0.95, "nesterov": True, "steps": 5, "scale": 0.2}
KINDS = [("muon", "fp32"), ("muon", "bf16"), ("adamw", "fp32"), ("adamw", "bf16")]
BOTH = OptimizerConfig(master_weights="bf16", state_dtype="bf16", router_orthogonality=1e-4)


def nearest(values, key, first=0, out=None):
    return out.copy_(values.to(BF16).view(torch.int16))


def config(kind: str, state: str) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=kind, master_weights="bf16", state_dtype=state, router_orthogonality=1e-4
    )


def after(
    kind: str, dtype: torch.dtype, steps: int, lr: float, function=None, state_dtype=None
) -> torch.Tensor:
    """A [64, 64] weight of ones after steps with one constant tiny gradient."""
    param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    gradient = 1e-6 * torch.randn(64, 64, generator=generator).to(BF16)
    more = {"state_dtype": state_dtype, "rounding": Rounding(3, function) if function else Rounding(3)}
    if kind == "muon":
        optimizer = Muon([MuonParam("w", param, "whole", 1.0, 0.0)], **MUON, dtype=torch.float32, **more)
    else:
        optimizer = AdamW([AdamWParam("w", param, 1.0, 0.0)], **ADAMW, **more)
    for step in range(steps):
        param.grad = gradient.to(dtype).clone()
        optimizer.rounding.updates = step
        optimizer.step(lr)
    return param.detach().double()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_updates_far_below_the_spacing_arrive_on_average_and_stall_in_nearest_rounding(kind):
    """Every update is 1/40 of the spacing of bf16 or less; rounded to nearest none of them ever arrives."""
    steps, lr = 40, 2e-4 if kind == "muon" else 1e-4
    moved = after(kind, torch.float32, steps, lr) - 1
    assert 0 < moved.abs().max() < 0.03
    assert torch.equal(after(kind, BF16, steps, lr, nearest), torch.ones(64, 64, dtype=torch.float64))
    got = after(kind, BF16, steps, lr) - 1
    # Along the expected movement; a value's variance is at most its way times the spacing (1/128 above one).
    share = (got * moved).sum() / moved.square().sum()
    sigma = (moved.square() * moved.abs() / 128).sum().sqrt() / moved.square().sum()
    assert sigma < 0.05
    assert abs(share - 1) < 3 * sigma


def test_averages_in_bf16_are_unbiased_and_nearly_as_good():
    """exp_avg_sq too: its mean over values stays that of fp32, each value within the noise of beta2."""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.ones(1 << 14)) for _ in range(2)]
    exact = AdamW([AdamWParam("w", params[0], 1.0, 0.0)], **ADAMW)
    short = AdamW([AdamWParam("w", params[1], 1.0, 0.0)], **ADAMW, state_dtype=BF16)
    for step in range(60):
        gradient = torch.randn(1 << 14, generator=generator)
        for p, optimizer in zip(params, (exact, short), strict=True):
            p.grad = gradient
            optimizer.rounding.updates = step
            optimizer.step(1e-3)
    assert short.exp_avg_sq[0].dtype == short.exp_avg[0].dtype == BF16
    assert (short.exp_avg_sq[0] >= 0).all()
    relative = short.exp_avg_sq[0].double() / exact.exp_avg_sq[0].double() - 1
    # One rounding: variance of at most spacing^2 / 4, spacing at most 2^-7; the average keeps 1/(1 - beta2^2) of them.
    noise = 2**-7 / 2 / math.sqrt(1 - 0.95**2)
    assert relative.std() < noise
    assert abs(relative.mean()) < 3 * noise / math.sqrt(1 << 14)
    moved, expected = (p.detach().double() - 1 for p in (params[1], params[0]))
    assert (moved - expected).norm() < 0.01 * expected.norm()


def test_bf16_momentum_beside_fp32_weights_stays_near_fp32s():
    wide, narrow = new_model(torch.float32), new_model(torch.float32)
    exact = build_optimizer(wide, OptimizerConfig())
    short = build_optimizer(narrow, OptimizerConfig(state_dtype="bf16"))
    train(wide, exact, torch.float32)
    train(narrow, short, torch.float32)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    for name, momentum in short.muon.tensors().items():
        expected = exact.muon.tensors()[name]
        assert momentum.dtype == BF16
        # Three roundings of at most a spacing of 2^-7 each.
        assert (momentum.float() - expected).norm() < 3 * 2**-7 * expected.norm(), name
        assert not torch.equal(momentum.float(), expected), name


@pytest.mark.parametrize(("kind", "state"), KINDS)
def test_resume_is_exact(kind, state):
    whole = new_model(BF16)
    whole_optimizer = build_optimizer(whole, config(kind, state), seed=7)
    train(whole, whole_optimizer, BF16)
    train(whole, whole_optimizer, BF16)

    first = new_model(BF16)
    optimizer = build_optimizer(first, config(kind, state), seed=7)
    train(first, optimizer, BF16)
    second = new_model(BF16)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, config(kind, state), seed=7)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(optimizer.tensors()[name])
    resumed.load_scalars(optimizer.scalars())
    train(second, resumed, BF16)
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert a.dtype == BF16
        assert torch.equal(a, b), name
    for name, tensor in whole_optimizer.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name

    other = new_model(BF16)
    train(other, build_optimizer(other, config(kind, state), seed=8), BF16)
    assert not all(torch.equal(a, b) for a, b in zip(other.parameters(), first.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "state"), KINDS)
def test_each_weight_is_a_neighbour_of_the_fp32_update(kind, state):
    """One step: what is stored lies within one spacing of what fp32 arithmetic gives; the kept groups are nearest."""
    model, wide = new_model(BF16), new_model(torch.float32)
    with torch.no_grad():
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.copy_(p)
            if q.requires_grad:
                p.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel())).to(BF16)
                q.grad = p.grad.float()
    build_optimizer(model, config(kind, state)).step(LR)
    build_optimizer(wide, OptimizerConfig(optimizer=kind, muon_dtype="fp32", router_orthogonality=1e-4)).step(
        LR
    )
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        if rule_of(name).group in FP32_GROUPS:
            assert torch.equal(p, q.to(BF16)), name
        else:  # bf16 momentum turns a Muon update a little
            spacing = torch.exp2(q.abs().log2().floor() - 7)
            assert ((p.float() - q).abs() <= spacing + 0.01 * LR).all(), name


def test_small_groups_keep_what_bf16_would_lose():
    model = new_model(BF16)
    optimizer = build_optimizer(model, BOTH)
    masters = optimizer.adamw.masters
    kept = {n for n, p in model.named_parameters() if p.requires_grad and rule_of(n).group in FP32_GROUPS}
    assert masters.keys() == kept == {
        "image_in.bias", "time_embed.norm.weight", "blocks.1.moe.router.weight"
    }  # fmt: skip
    train(model, optimizer, BF16)
    parameters = dict(model.named_parameters())
    for name in kept:
        assert torch.equal(parameters[name], masters[name].to(BF16)), name
        assert optimizer.tensors()[f"adamw.exp_avg.{name}"].dtype == torch.float32
    assert not torch.equal(
        masters["blocks.1.moe.router.weight"].to(BF16).float(), masters["blocks.1.moe.router.weight"]
    )
    with torch.no_grad():  # weights loaded after the optimizer was built
        for p in parameters.values():
            p.fill_(0.5)
    optimizer.adamw.follow()
    assert all((m.to(BF16) == 0.5).all() for m in masters.values())


def test_small_groups_are_a_small_part_of_the_published_model():
    shape = PRESETS["nucleus_image_17b"]
    from megatron_nucleus.core.models.nucleus import NucleusTransformer

    with torch.device("meta"):
        model = NucleusTransformer(shape)
    kept = sum(p.numel() for n, p in model.named_parameters() if rule_of(n).group in FP32_GROUPS)
    assert 1e-4 < kept / sum(p.numel() for p in model.parameters()) < 1e-3


@pytest.mark.parametrize(("kind", "state"), KINDS)
def test_pieces_do_not_change_a_bit(kind, state, monkeypatch):
    def trained():
        model = new_model(BF16)
        optimizer = build_optimizer(model, config(kind, state))
        train(model, optimizer, BF16)
        return [*model.parameters(), *optimizer.tensors().values()]

    expected = trained()
    monkeypatch.setitem(rounding.PIECE_VALUES, "cpu", 64)  # of up to 384 values; vector loops stay whole
    assert all(torch.equal(a, b) for a, b in zip(trained(), expected, strict=True))


class Largest(TorchDispatchMode):
    """The most values that a new tensor has had."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            known = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
            self.values = max(self.values, result.numel() * (result.data_ptr() not in known))
        return result


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_memory_beside_the_parameters_is_bounded(kind, monkeypatch):
    """No fp32 copy of a parameter: what is computed at once is a piece, or a batch of matrices of Muon's."""
    for module, values in ((rounding, 1 << 9), (stochastic_round_module, 1 << 9), (muon_module, 1 << 10)):
        name = "BATCH_VALUES" if module is muon_module else "PIECE_VALUES"
        monkeypatch.setitem(getattr(module, name), "cpu", values)
    param = nn.Parameter(torch.zeros(64, 16, 32, dtype=BF16))
    param.grad = torch.ones_like(param)
    if kind == "muon":
        optimizer = Muon([MuonParam("w", param, "per expert", 1.0, 0.1)], **MUON, state_dtype=BF16)
    else:
        optimizer = AdamW([AdamWParam("w", param, 1.0, 0.1)], **ADAMW, state_dtype=BF16)
    with Largest() as largest:
        optimizer.step(0.1)
    assert 0 < largest.values <= 1 << 10
    assert param.detach().any()


def test_no_update_changes_no_bit():
    model = new_model(BF16)
    before = [p.clone() for p in model.parameters()]
    train(model, build_optimizer(model, OptimizerConfig(
        lr=0.0, master_weights="bf16", lr_factors=tuple(f"{g}=0" for g in optimizer_module.param_groups.GROUPS)
    )), BF16)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_clipping_measures_bf16_gradients_exactly():
    param = nn.Parameter(torch.zeros(100_000, dtype=BF16))
    param.grad = torch.full_like(param, 0.01)
    value = float(param.grad[0])
    report = clip_gradients([param], 1.0)
    assert float(report.norm) == pytest.approx(value * math.sqrt(100_000), rel=1e-6)
    assert param.grad.dtype == BF16
    assert float(param.grad[0]) == pytest.approx(1 / math.sqrt(100_000), rel=2**-8)


def sharded(replicate: int, ep: int) -> dict:
    layout = make_layout(2, experts=EXPERTS, ep=ep, replicate=replicate)
    model = shard(new_model(BF16), layout)
    optimizer = build_optimizer(model, BOTH, seed=7)
    train(model, optimizer, BF16, layout)
    values = {n: p.detach().to_local() for n, p in model.named_parameters()}
    values |= {n: t.to_local() for n, t in optimizer.tensors().items()}
    return {n: t.float().numpy().copy() for n, t in values.items()}


def all_pairs() -> dict:
    return {grid: sharded(*grid) for grid in ((1, 1), (1, 2), (2, 1))}


def test_two_ranks_round_as_one_process_does(tmp_path):
    """Value by value alike; only sums over whole matrices (Newton-Schulz) may fall on the other neighbour."""
    model = new_model(BF16)
    optimizer = build_optimizer(model, BOTH, seed=7)
    train(model, optimizer, BF16)
    whole = {n: p.detach() for n, p in model.named_parameters()} | optimizer.tensors()
    for rank, results in enumerate(run_ranks(2, all_pairs, tmp_path)):
        for (replicate, ep), values in results.items():
            layout = make_layout(2, experts=EXPERTS, ep=ep, replicate=replicate)
            assert values.keys() == whole.keys()
            for name, got in values.items():
                got = torch.from_numpy(got)
                expected = part_of(whole[name].float(), name, layout, rank)
                if name.startswith(("adamw", "muon")) or rule_of(name).optimizer == "adamw":
                    assert torch.equal(got, expected), (name, replicate, ep)
                else:
                    assert ((got - expected).abs() <= 2**-7 * expected.abs() + 1e-6).all(), name
                    assert (got != expected).double().mean() <= 0.01, (name, replicate, ep)


def test_gradients_of_a_rank_are_its_own(tmp_path):
    """Copies of a parameter stay copies: both replicas of a grid hold the same bits."""
    first, second = run_ranks(2, sharded, tmp_path, 2, 1)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first if ".experts." not in name)


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        (torch.float32, {"master_weights": "bf16"}, "master_weights bf16: parameter .* is torch.float32, not torch.bf"),
        (torch.float16, {"master_weights": "bf16"}, "is torch.float16, not torch.bfloat16; convert the model first"),
        (torch.float16, {}, "is torch.float16; keep parameters in float32"),
        (BF16, {}, "for bfloat16, choose --master-weights bf16"),
        (torch.float64, {"state_dtype": "bf16"}, "state_dtype bf16: parameter .* is torch.float64; convert it"),
        (BF16, {"master_weights": "bf16", "adamw_backend": "apex"}, "--adamw-backend apex: .*Usable here: torch"),
        (torch.float32, {"state_dtype": "bf16", "adamw_backend": "apex"}, "--adamw-backend apex: .*Usable here: tor"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(dtype, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(new_model(dtype), OptimizerConfig(**settings))


@pytest.mark.parametrize(("dtype", "state"), [(BF16, None), (torch.float32, BF16)])
def test_a_kernel_for_fp32_is_refused(dtype, state, monkeypatch):
    monkeypatch.setattr(adamw_module, "why_unavailable", lambda backend, device_type: None)
    params = [AdamWParam("w", nn.Parameter(torch.zeros(3, dtype=dtype)), 1.0, 0.0)]
    with pytest.raises(ConfigError, match=r"apex: takes float32 (parameters|averages).*bfloat16"):
        AdamW(params, **ADAMW, backend="apex", state_dtype=state)


def test_parameters_without_memory_or_in_another_order_are_refused():
    with pytest.raises(ConfigError, match="is on the meta device; materialise it first"):
        build_optimizer(new_model(BF16).to("meta"), BOTH)
    model = new_model(BF16)
    model.image_in.weight = nn.Parameter(model.image_in.weight.detach().T.contiguous().T)
    with pytest.raises(ConfigError, match="'image_in.weight' is not stored row by row"):
        build_optimizer(model, BOTH)


def test_first_values_follow_the_rows_of_a_rank(tmp_path):
    assert run_ranks(2, first_values, tmp_path) == [(0, 0), (4 * 5, 2 * 8 * 12)]  # of 7 and of 4 rows


def first_values() -> tuple[int, int]:
    layout = make_layout(2, experts=EXPERTS, ep=2, replicate=1)
    model = shard(new_model(BF16), layout)
    parameters = dict(model.named_parameters())
    assert dist.get_world_size() == 2
    return tuple(
        optimizer_module.shards.first_value(parameters[n])
        for n in ("image_in.weight", "blocks.1.moe.experts.gate_up")
    )
