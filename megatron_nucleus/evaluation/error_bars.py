"""Shares of correct pictures and their standard errors.

What is independent: prompts. A prompt is one position of one seed's list, with all of its pictures, which share what
the prompt asks for. With one picture per prompt the error is the binomial one, with n - 1 in place of n:

    sqrt(p (1 - p) / (n - 1))

and with more, or unequal numbers of them, that of a ratio over clusters (Cochran, Sampling Techniques, 2.11):

    sqrt(G / (G - 1) * sum_g (correct_g - p * pictures_g)^2) / N        G prompts, N pictures

Seeds only add prompts: the noise and the order of another seed are drawn anew, so nothing ties the pictures of a seed
together, and pooling the prompts of all seeds says more than the spread of two or three means. That spread is reported
beside it (`spread`), as a check.

A request that comes back in the list counts as another prompt: its noise is another. Where the list covers all that a
skill can ask, the error is too large if anything, for it also counts how much harder one request is than another.
What it never holds is the difference between two trainings. A share of 0 or 1 has error 0, although the truth may be
up to 3/n away (the rule of three, 95 %).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """value: share of correct pictures in [0, 1]. error: its standard error, None for one prompt alone."""

    value: float
    error: float | None
    pictures: int


def share(prompts: Sequence[Sequence[bool]]) -> Share | None:
    """The share of correct pictures; None where there are none.

    Args:
        prompts: verdicts on the pictures of each prompt.
    """
    pictures = sum(map(len, prompts))
    if not pictures:
        return None
    value = sum(map(sum, prompts)) / pictures
    count = sum(1 for verdicts in prompts if verdicts)
    if count < 2:
        return Share(value, None, pictures)
    squares = math.fsum((sum(verdicts) - value * len(verdicts)) ** 2 for verdicts in prompts)
    return Share(value, math.sqrt(count / (count - 1) * squares) / pictures, pictures)


def mean_of(shares: Iterable[Share | None]) -> tuple[float | None, float | None]:
    """Mean of the shares that are there, each with the same weight, and its standard error.

    The error is None where that of a share is unknown; shares of different prompts are independent.
    """
    present = [s for s in shares if s is not None]
    if not present:
        return None, None
    errors = [s.error for s in present]
    mean = sum(s.value for s in present) / len(present)
    return mean, None if None in errors else math.hypot(*errors) / len(present)


def spread(values: Iterable[float | None]) -> float | None:
    """Standard deviation of the values of single seeds (n - 1); None for fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def shown(value: float | None, error: float | None) -> str:
    """``0.653 ± 0.012``; without an error the value alone, ``–`` without a value."""
    if value is None:
        return "–"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
