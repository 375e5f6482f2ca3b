"""Weights of a merged window, and that they are the learning-rate decay which they claim to be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.export.load import load_model
from megatron_nucleus.export.merge import merge
from megatron_nucleus.export.merge_weights import SCHEMES, decay_of, merge_weights
from megatron_nucleus.utils.errors import ConfigError
from tests.shapes import TINY

NAMED = [scheme for scheme in SCHEMES if scheme != "custom"]
DECAYS = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + np.cos(np.pi * u)) / 2,
    "one_minus_sqrt": lambda u: 1 - np.sqrt(u),
}


def even(count: int) -> list[int]:
    return [100 * k for k in range(1, count + 1)]


def test_formulas_by_hand():
    root2, root3 = 1 / math.sqrt(2), 1 / math.sqrt(3)
    total = 1 + root2 + root3
    assert merge_weights("inverse_sqrt", even(3)) == pytest.approx(
        [root3 / total, root2 / total, 1 / total], rel=1e-15
    )
    assert merge_weights("uniform", even(4)) == [0.25] * 4
    assert merge_weights("ema", even(3), ema_decay=0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=1e-15)
    assert merge_weights("ema", even(2)) == merge_weights("ema", even(2), ema_decay=0.9)
    # linear over two stretches: 3/4 and 1/4 on average
    assert decay_of(merge_weights("linear", even(3))) == pytest.approx([1, 0.75, 0.25], rel=1e-15)
    assert merge_weights("linear", even(3)) == pytest.approx([0.25, 0.5, 0.25], rel=1e-15)
    assert decay_of(merge_weights("cosine", even(3))) == pytest.approx(
        [1, 0.5 + 1 / math.pi, 0.5 - 1 / math.pi], rel=1e-15
    )
    assert decay_of(merge_weights("one_minus_sqrt", even(2))) == pytest.approx([1, 1 / 3], rel=1e-15)
    values = [1.0, 0.0, 3.0]
    assert merge_weights("custom", even(3), weight_values=values) == [0.25, 0.0, 0.75]
    multipliers = [1.0, 0.5, 0.5, 0.0]
    assert merge_weights("custom", even(4), decay_multipliers=multipliers) == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("scheme", NAMED)
@pytest.mark.parametrize("count", [1, 2, 16, 100])
def test_every_scheme_is_an_average_that_decays(scheme, count):
    for steps in (even(count), [k * k + 7 for k in range(1, count + 1)]):
        weights = merge_weights(scheme, steps)
        assert len(weights) == count
        assert min(weights) > 0
        assert math.fsum(weights) == pytest.approx(1.0, abs=1e-14)
        multipliers = decay_of(weights)
        assert multipliers[0] == 1.0
        assert all(a > b > 0 for a, b in itertools.pairwise(multipliers))
        if scheme in ("inverse_sqrt", "ema"):
            assert weights == sorted(weights)
        again = merge_weights("custom", steps, decay_multipliers=multipliers)
        assert again == pytest.approx(weights, abs=1e-15)
        scaled = merge_weights("custom", steps, weight_values=[40 * w for w in weights])
        assert scaled == pytest.approx(weights, rel=1e-14)
    if count == 1:
        assert weights == [1.0]


@pytest.mark.parametrize("scheme", DECAYS)
def test_decays_follow_the_steps_between_the_checkpoints(scheme):
    """Each multiplier is the decay's mean over its stretch, whatever the stretches' lengths."""
    steps = [50, 60, 100, 104, 250]
    multipliers = decay_of(merge_weights(scheme, steps))
    for (a, b), value in zip(itertools.pairwise(steps), multipliers[1:], strict=True):
        middles = a + (np.arange(200_000) + 0.5) / 200_000 * (b - a)
        u = (middles - steps[0]) / (steps[-1] - steps[0])
        assert value == pytest.approx(DECAYS[scheme](u).mean(), rel=1e-6)
    # as much learning in the window as the decayed run has, however it is cut
    lengths = np.diff(steps) / 200
    whole = {"linear": 1 / 2, "cosine": 1 / 2, "one_minus_sqrt": 1 / 3}[scheme]
    assert lengths @ multipliers[1:] == pytest.approx(whole, rel=1e-14)
    # shifting and stretching the clock changes nothing
    assert merge_weights(scheme, [7 * s + 3 for s in steps]) == pytest.approx(merge_weights(scheme, steps))


def test_finer_checkpoints_come_closer_to_the_decay():
    """Updates of size 1 per step: the average's error against the decayed sum shrinks with the square."""
    rng = np.random.default_rng(0)
    phases = rng.normal(size=4)
    updates = np.sin(np.arange(1, 961)[:, None] / 960 * np.array([1, 2, 3, 5]) + phases)  # smooth in time
    theta = np.concatenate([np.zeros((1, 4)), updates.cumsum(0)])
    middles = (np.arange(960) + 0.5) / 960
    decayed = (updates * (1 - middles)[:, None]).sum(0)
    errors = []
    for count in (4, 8, 16):
        steps = [960 * k // count for k in range(count + 1)]
        merged = np.array(merge_weights("linear", steps)) @ theta[steps]
        errors.append(np.abs(merged - decayed).max())
    assert errors[0] > 3.5 * errors[1] > 12 * errors[2]


def test_ema_weights_equal_a_bias_corrected_moving_average():
    rng, decay = np.random.default_rng(0), 0.83
    thetas = rng.normal(size=(7, 50))
    average = np.zeros(50)
    for theta in thetas:
        average = decay * average + (1 - decay) * theta
    average /= 1 - decay ** len(thetas)
    combined = np.array(merge_weights("ema", even(7), ema_decay=decay)) @ thetas
    np.testing.assert_allclose(combined, average, rtol=1e-13)


# ---- the same, through the optimizers and the files of a run

CHECKPOINTS = (3, 4, 7, 8, 12)  # steps; 3 belongs to no stretch of the window


def run_on_fixed_gradients(optimizer: str, rate_at, save) -> None:
    """12 steps in float64 with gradients that depend on the step alone."""
    model = NucleusTransformer(TINY, seed=3).double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    config = OptimizerConfig(  # without what makes an update depend on the weights
        optimizer=optimizer, weight_decay=0.0, router_orthogonality=0.0, lr_factors=("router=0.5",)
    )
    updater = build_optimizer(model, config)
    for step in range(1, CHECKPOINTS[-1] + 1):
        generator = torch.Generator().manual_seed(step)
        for parameter in updater.params.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        updater.step(lr=1e-2 * rate_at(step))
        save(model, step)


@pytest.mark.parametrize(("optimizer", "schemes"), [("adamw", NAMED), ("muon", ["inverse_sqrt", "cosine"])])
def test_a_merged_run_equals_the_run_with_the_decayed_rate(make, tmp_path, optimizer, schemes):
    def save(model, step):
        if step in CHECKPOINTS:
            make.run(tmp_path / "run", model, step)

    run_on_fixed_gradients(optimizer, lambda step: 1.0, save)
    for scheme in schemes:
        report = merge(tmp_path / "run", tmp_path / scheme, scheme, last=len(CHECKPOINTS))
        multipliers, decayed = report["decay_multipliers"], {}

        def rate_at(step, multipliers=multipliers):
            return multipliers[sum(step > end for end in CHECKPOINTS)]

        run_on_fixed_gradients(
            optimizer, rate_at, lambda model, step, kept=decayed: kept.update(model.state_dict())
        )
        merged = load_model(tmp_path / scheme).state_dict()
        moved = load_model(tmp_path / "run").state_dict()
        assert merged.keys() == decayed.keys()
        for name, value in merged.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, decayed[name], rtol=0, atol=1e-12, msg=f"{scheme} {name}")
        assert max(float((moved[n] - merged[n]).abs().max()) for n in merged) > 1e-3  # the decay matters


# ---- refused

REFUSED = [
    (("inverse_sqr", {}), r"--weights inverse_sqr: unknown \(did you mean inverse_sqrt"),
    (("uniform", {"ema_decay": 0.5}), "--ema-decay 0.5: only with --weights ema, not uniform"),
    (("ema", {"weight_values": [1, 2, 3]}), "--weight-values 1 2 3: only with --weights custom, not ema"),
    (("linear", {"decay_multipliers": [1, 0.5, 0]}), "--decay-multipliers 1 0.5 0: only with --weights custom"),
    (("custom", {}), "exactly one of --weight-values and --decay-multipliers"),
    (("custom", {"weight_values": [1, 1, 1], "decay_multipliers": [1, 1, 1]}), "exactly one of"),
    (("custom", {"weight_values": [1, 2]}), "--weight-values 1 2: 2 values for 3 checkpoints"),
    (("custom", {"weight_values": [1, 2, math.nan]}), "nan is not allowed; each must be finite"),
    (("custom", {"weight_values": [1, math.inf, 1]}), "inf is not allowed"),
    (("custom", {"weight_values": [1, -0.5, 1]}), "-0.5 is not allowed; .* not negative"),
    (("custom", {"weight_values": [0, 0, 0]}), "sum to 0; at least one must be positive"),
    (("custom", {"weight_values": [1e308, 1e308, 1]}), "sum to inf"),
    (("custom", {"decay_multipliers": [1, 0.5]}), "2 values for 3 checkpoints; give one for each, oldest first"),
    (("custom", {"decay_multipliers": [0.9, 0.5, 0]}), "the first must be 1"),
    (("custom", {"decay_multipliers": [1, 0.4, 0.5]}), "0.5 after 0.4; each must be at least 0 and not above"),
    (("custom", {"decay_multipliers": [1, 0.4, -0.1]}), "-0.1 after 0.4"),
    (("custom", {"decay_multipliers": [1, math.nan, 0]}), "nan after 1"),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "message"), REFUSED)
def test_bad_weights_are_named(choice, message):
    scheme, options = choice
    with pytest.raises(ConfigError, match=message):
        merge_weights(scheme, even(3), **options)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, -1.0, math.nan])
def test_bad_ema_decay(decay):
    with pytest.raises(ConfigError, match="--ema-decay"):
        merge_weights("ema", even(2), ema_decay=decay)


def test_steps_must_ascend():
    for steps in ([], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="ascending"):
            merge_weights("uniform", steps)
