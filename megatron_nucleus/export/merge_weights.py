"""Weights of the checkpoints in a merged window, and the learning-rate decay that they stand for.

Take n checkpoints theta_1 (oldest) .. theta_n of a run at a constant rate, and weights c_1 .. c_n that sum to 1:

    sum_j c_j theta_j  =  theta_1 + sum_{i>=2} d_i (theta_i - theta_{i-1}),    d_i = c_i + c_{i+1} + ... + c_n

So the average equals a run whose updates between checkpoints i-1 and i were multiplied by d_i: a learning rate that
falls from checkpoint to checkpoint, with d_1 = 1 for everything up to the oldest one. It is exact where an update
does not depend on the weights it is applied to, and the reason to merge instead of to decay where it does. The other
way round, any decay 1 = d_1 >= d_2 >= ... >= d_n >= 0 has weights c_j = d_j - d_{j+1} and c_n = d_n.

Source: arXiv 2507.17634 (Warmup-Stable-Merge), theorem on checkpoint merging and learning-rate decay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from megatron_nucleus.utils.errors import ConfigError, nearest

DEFAULT_EMA_DECAY = 0.9  # own choice
CUSTOM = "custom"

# A decay's integral from 0 to u, where u runs from 0 at the oldest checkpoint of the window to 1 at the newest.
_DECAY_INTEGRALS: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u - u * u / 2,  # of 1 - u
    "cosine": lambda u: u / 2 + math.sin(math.pi * u) / (2 * math.pi),  # of (1 + cos(pi u)) / 2
    "one_minus_sqrt": lambda u: u - 2 * u**1.5 / 3,  # of 1 - sqrt(u)
}
SCHEMES = ("inverse_sqrt", "uniform", "ema", *_DECAY_INTEGRALS, CUSTOM)


def merge_weights(
    scheme: str,
    steps: Sequence[int],
    *,
    ema_decay: float | None = None,
    weight_values: Sequence[float] | None = None,
    decay_multipliers: Sequence[float] | None = None,
) -> list[float]:
    """Weights of checkpoints, oldest first; not negative, summing to 1.

    By the checkpoints' order, whatever lies between them; the k-th newest (k = 1 is the newest) has

        inverse_sqrt     a weight proportional to 1/sqrt(k); how the published formula counts is not known
        uniform          1/n
        ema              a weight proportional to ema_decay**(k-1): what an exponential moving average holds that was
                         updated once at every checkpoint, started at zero, and divided by its total weight
                         1 - ema_decay**n

    By a decay of the learning rate from 1 at the oldest checkpoint to 0 at the newest one, over the optimizer steps
    between; u is the share of these steps that is behind. The updates between two checkpoints get the mean of the
    decay over the steps between them, so finer checkpoints come closer to the decay and never exceed it:

        linear           1 - u
        cosine           (1 + cos(pi u)) / 2
        one_minus_sqrt   1 - sqrt(u)

    As given, for ``custom``: ``weight_values``, divided by their sum, or ``decay_multipliers``.

    Args:
        steps: optimizer steps of the checkpoints, ascending; at least one.
        ema_decay: with ``ema``: in (0, 1), decay from one checkpoint to the next (not from step to step); None =
            `DEFAULT_EMA_DECAY`.
        weight_values: with ``custom``: one per checkpoint, oldest first; finite, not negative, not all zero.
        decay_multipliers: with ``custom``: one per checkpoint, oldest first; the first 1, none above the one before
            it, none negative (`decay_of` returns this form).

    Raises:
        ConfigError: unknown scheme, an option of another scheme, or a value out of range.
    """
    _check_options(scheme, ema_decay, weight_values, decay_multipliers)
    count = len(steps)
    if count < 1 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"steps must be ascending and at least one, got {list(steps)}")
    if scheme in _DECAY_INTEGRALS:
        return _weights_of(_segment_means(_DECAY_INTEGRALS[scheme], steps))
    if decay_multipliers is not None:
        _check_multipliers(decay_multipliers, count)
        return _weights_of(decay_multipliers)
    if weight_values is not None:
        return _normalised(_checked_values(weight_values, count))
    ages = range(count, 0, -1)
    if scheme == "ema":
        decay = DEFAULT_EMA_DECAY if ema_decay is None else ema_decay
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"--ema-decay {decay}: must lie between 0 and 1, both excluded")
        return _normalised([decay ** (k - 1) for k in ages])
    return _normalised([1.0 if scheme == "uniform" else 1.0 / math.sqrt(k) for k in ages])


def decay_of(weights: Sequence[float]) -> list[float]:
    """The learning-rate multipliers d_1 = 1, d_2, ... that an average with ``weights`` (sum 1) stands for.

    d_i multiplies the updates between checkpoints i-1 and i; d_1 those up to the oldest checkpoint.
    """
    return [1.0, *(math.fsum(weights[i:]) for i in range(1, len(weights)))]


def _weights_of(multipliers: Sequence[float]) -> list[float]:
    return [here - after for here, after in itertools.pairwise([*multipliers, 0.0])]


def _segment_means(integral: Callable[[float], float], steps: Sequence[int]) -> list[float]:
    """1 for what led to the oldest checkpoint, then the decay's mean over every stretch between checkpoints."""
    window_steps = steps[-1] - steps[0]
    shares = [(step - steps[0]) / window_steps if window_steps else 0.0 for step in steps]
    means = [(integral(b) - integral(a)) / (b - a) for a, b in itertools.pairwise(shares)]
    return [1.0, *means]


def _normalised(raw: Sequence[float]) -> list[float]:
    total = math.fsum(raw)
    return [value / total for value in raw]


def _check_options(scheme: str, ema_decay, weight_values, decay_multipliers) -> None:
    if scheme not in SCHEMES:
        raise ConfigError(
            f"--weights {scheme}: unknown{nearest(scheme, SCHEMES)}; one of: {', '.join(SCHEMES)}"
        )
    given = {"--weight-values": weight_values, "--decay-multipliers": decay_multipliers}
    if ema_decay is not None and scheme != "ema":
        raise ConfigError(f"--ema-decay {ema_decay}: only with --weights ema, not {scheme}")
    for option, values in given.items():
        if values is not None and scheme != CUSTOM:
            raise ConfigError(f"{option} {_shown(values)}: only with --weights custom, not {scheme}")
    if scheme == CUSTOM and sum(values is not None for values in given.values()) != 1:
        raise ConfigError("--weights custom: give exactly one of --weight-values and --decay-multipliers")


def _checked_values(values: Sequence[float], count: int) -> Sequence[float]:
    option = f"--weight-values {_shown(values)}"
    _check_count(option, values, count)
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{option}: {value:g} is not allowed; each must be finite and not negative")
    total = sum(values)
    if not (0 < total < math.inf):
        raise ConfigError(f"{option}: they sum to {total:g}; at least one must be positive")
    return values


def _check_multipliers(values: Sequence[float], count: int) -> None:
    option = f"--decay-multipliers {_shown(values)}"
    _check_count(option, values, count)
    if values[0] != 1:
        raise ConfigError(
            f"{option}: the first must be 1, for the updates up to the oldest checkpoint, which all checkpoints share"
        )
    for before, value in itertools.pairwise(values):
        if not 0 <= value <= before:
            raise ConfigError(
                f"{option}: {value:g} after {before:g}; each must be at least 0 and not above the one before it"
            )


def _check_count(option: str, values: Sequence[float], count: int) -> None:
    if len(values) != count:
        raise ConfigError(
            f"{option}: {len(values)} values for {count} checkpoints; give one for each, oldest first"
        )


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
