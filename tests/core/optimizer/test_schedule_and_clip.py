"""Warm-up on the sample clock, and the global gradient norm."""

import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from megatron_nucleus.core.optimizer.clip import (
    ClipOps,
    clip_gradients,
    local_square_sum,
    resolve_clip,
    scale_gradients,
)
from megatron_nucleus.core.optimizer.schedule import ScheduleConfig, build_schedule
from megatron_nucleus.ops import grad_norm, registry
from megatron_nucleus.utils.errors import ConfigError


def test_warm_up_is_linear_then_constant():
    schedule = build_schedule(ScheduleConfig(), lr=1e-4, global_batch_size=4096)  # the published recipe
    assert schedule(0) == pytest.approx(1e-7)
    assert schedule(499 * 4096) == pytest.approx(5e-5)
    assert schedule(999 * 4096) == pytest.approx(1e-4)
    assert schedule(10**9) == 1e-4
    rates = [schedule(k * 4096) for k in range(1000)]
    assert all(math.isclose(b - a, 1e-7, rel_tol=1e-6) for a, b in itertools.pairwise(rates))


def test_no_warm_up_and_the_clock_is_samples_not_steps():
    assert build_schedule(ScheduleConfig(lr_warmup_steps=0), 0.5, 64)(0) == 0.5
    small = build_schedule(ScheduleConfig(lr_warmup_steps=100), 1.0, 32)
    large = build_schedule(ScheduleConfig(lr_warmup_steps=50), 1.0, 64)
    assert small(1600 - 32) == large(1600 - 64) == 0.5
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        ScheduleConfig(lr_warmup_steps=-1)


def test_the_rate_knows_no_horizon():
    """Whether and where a run ends, or is extended, changes no rate: it is a function of the samples before a step."""
    schedule = build_schedule(ScheduleConfig(lr_warmup_steps=3), lr=0.5, global_batch_size=8)
    rates = [schedule(8 * step) for step in range(10_000)]
    assert rates[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert set(rates[2:]) == {0.5}
    assert [schedule(8 * step) for step in range(6)] == rates[:6]  # of a shorter run
    assert set(inspect.signature(build_schedule).parameters) == {"config", "lr", "global_batch_size"}


def make_params(scale: float) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(s)) for s in [(3, 4), (7,), (2, 3, 5)]] + [
        nn.Parameter(torch.zeros(2))
    ]
    for i, p in enumerate(params[:-1]):  # the last one has no gradient
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * scale
    return params


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_clipping_equals_torch(scale):
    ours, theirs = make_params(scale), make_params(scale)
    report = clip_gradients(ours, 1.0)
    norm = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(report.norm, norm)
    assert bool(report.finite)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert float(local_square_sum(ours)) <= 1.0 + 1e-5
    assert ours[-1].grad is None


def test_zero_measures_without_clipping():
    params = make_params(100.0)
    before = [p.grad.clone() for p in params[:-1]]
    norm = clip_gradients(params, 0.0).norm
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=False))
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in before)), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_bad_value_is_seen(bad):
    params = make_params(1.0)
    params[2].grad[1, 2, 3] = bad
    report = clip_gradients(params, 1.0)
    assert not bool(report.finite)
    assert report.finite.dtype == torch.bool


def test_the_norm_may_come_from_elsewhere():
    """A caller that sums the squares itself, over ranks, scales by what it found: 10 is brought to 2.5."""
    params = make_params(1.0)
    before = [p.grad.clone() for p in params[:-1]]
    scale_gradients(params, torch.tensor(10.0), 2.5)
    for p, g in zip(params, before, strict=False):
        torch.testing.assert_close(p.grad, g * 0.25)
    scale_gradients(params, torch.tensor(2.0), 2.5)
    for p, g in zip(params, before, strict=False):
        torch.testing.assert_close(p.grad, g * 0.25, msg="a norm below the limit changes nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_many_values_does_not_lose_them(dtype):
    params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1_000_000, 10)]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    square_sum = local_square_sum(params)
    assert square_sum.dtype == torch.float64
    assert float(square_sum) == pytest.approx(float(params[0].grad[0]) ** 2 * 1_000_010, rel=1e-9)
    norm = clip_gradients(params, 0.0).norm
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(math.sqrt(float(square_sum)), rel=1e-7)


def test_without_gradients_the_norm_is_zero():
    assert float(local_square_sum([])) == 0.0
    assert local_square_sum([nn.Parameter(torch.zeros(2))]).dtype == torch.float64
    assert float(clip_gradients([nn.Parameter(torch.zeros(2))], 1.0).norm) == 0.0


@pytest.mark.parametrize("backend", ["auto", "torch", "extension"])
def test_every_backend_clips_alike(backend):
    reason = None if backend == "auto" else registry.why_unavailable("square_sum", backend, device_type="cpu")
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    params, others = make_params(10.0), make_params(10.0)
    ops = resolve_clip(backend, params)
    norms = [clip_gradients(params, 1.0, ops=ops).norm, clip_gradients(others, 1.0).norm]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0.0)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0.0)


def test_a_backend_without_scaling_leaves_it_to_torch_and_one_that_is_not_there_is_an_error():
    params = make_params(1.0)
    assert resolve_clip("torch", params) == ClipOps() == resolve_clip("auto", [])
    assert resolve_clip("auto", params).scale_ is grad_norm.scale_
    with pytest.raises(ConfigError, match="square_sum backend 'extension_cuda'"):
        resolve_clip("extension_cuda", params)


def test_a_norm_of_the_host_scales_alike_and_leaves_small_gradients_untouched():
    params, others = make_params(10.0), make_params(10.0)
    norm = clip_gradients(others, 1.0).norm
    scale_gradients(params, float(norm), 1.0)
    for a, b in zip(params, others, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)

    grads = [p.grad for p in params if p.grad is not None]
    versions = [g._version for g in grads]
    scale_gradients(params, 0.5, 1.0)
    assert [g._version for g in grads] == versions
