"""The mixture of a run: what share of the images comes from which tier and episode bucket, and when that changes.

A *cell* is a tier (`index.TIERS`) and an episode bucket (`index.EPISODE_BUCKETS`). Each *phase* is a keyframe: a
weight for every cell, in force exactly at ``at_samples`` images seen, interpolated linearly to the next phase,
constant after the last. How the published run mixed is unknown; the tables are the user's.

This module reads and checks the settings; `data/mixture.py` evaluates them.

    curriculum:
      floor_frac: 0.02
      phases:
        - at_samples: 0
          tiers: {A1: 4, A2: 3, A3: 2, A4: 1, A5: 1}            # weight of a cell = its tier's x its episode's
          episodes: {B1: 8, B2: 7, B3: 6, B4: 5, B5: 4, B6: 3, B7: 2, B8: 1}
        - at_samples: 2000000
          table: {A1: {B1: 1, B2: 1}, A4: {B8: 3}}              # or cell by cell
          captions: {short: 1, medium: 1, detailed: 2}          # from here on; else the data section's weights
          caption_drop_frac: 0.1
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.utils.config import coerce, knob
from megatron_nucleus.utils.errors import ConfigError, nearest

CAPTION_CLASSES = ("short", "medium", "detailed")
Weights = tuple[tuple[str, float], ...]
_KEYS = ("at_samples", "tiers", "episodes", "table", "captions", "caption_drop_frac")
_ROUNDING = 1e-9  # floors that add up to 1 in decimals need not in binary


@dataclasses.dataclass(frozen=True)
class Phase:
    """One keyframe, as it was written: names with weights, not normalised.

    Either ``table`` (a weight per cell), or ``tiers`` and ``episodes``, of which one may be None: then each name of
    it that the corpus has weighs the same. A name that is left out of a mapping weighs 0.
    """

    at_samples: int
    tiers: Weights | None = None
    episodes: Weights | None = None
    table: tuple[tuple[str, Weights], ...] | None = None
    captions: Weights | None = None
    caption_drop_frac: float | None = None

    def shares(self, present: np.ndarray) -> np.ndarray:
        """Share of every cell, float64 [tiers, episode buckets] with sum 1.

        present: bool [tiers, episode buckets], the cells that have images; read only for a factor left out.
        """
        if self.table is not None:
            weights = np.zeros((len(TIERS), len(EPISODE_BUCKETS)))
            for tier, row in self.table:
                for episode, weight in row:
                    weights[TIERS.index(tier), EPISODE_BUCKETS.index(episode)] = weight
            return weights / math.fsum(weights.ravel())
        tiers = _factor(self.tiers, TIERS, present.any(axis=1))
        episodes = _factor(self.episodes, EPISODE_BUCKETS, present.any(axis=0))
        return tiers[:, None] * episodes[None, :]

    def named(self) -> list[tuple[str, str]]:
        """(key of the phase, name) of every tier and episode bucket with a weight above 0."""
        found = [("tiers", name) for name, weight in self.tiers or () if weight > 0]
        found += [("episodes", name) for name, weight in self.episodes or () if weight > 0]
        for tier, row in self.table or ():
            names = [episode for episode, weight in row if weight > 0]
            found += [("table", tier)] * bool(names) + [(f"table.{tier}", name) for name in names]
        return found


def _factor(weights: Weights | None, names: tuple[str, ...], present: np.ndarray) -> np.ndarray:
    given = dict(weights) if weights is not None else dict(zip(names, present.tolist(), strict=True))
    values = np.array([float(given.get(name, 0.0)) for name in names])
    return values / math.fsum(values)


@dataclasses.dataclass(frozen=True)
class Phases:
    """The keyframes in order of ``at_samples``, the first at 0. label: where they were read, for messages."""

    phases: tuple[Phase, ...]
    label: str = dataclasses.field(default="curriculum.phases", compare=False)

    @classmethod
    def from_plain(cls, raw: Any, label: str) -> Phases:
        """Read a list of mappings, as the module's docstring shows it.

        Raises:
            ConfigError: starts with ``label``; unknown keys or names, weights that are no finite numbers >= 0 or add
                up to 0, ``table`` together with ``tiers`` or ``episodes`` or none of them, ``at_samples`` that do
                not start at 0 or do not increase.
        """
        if not isinstance(raw, (list, tuple)) or not raw:
            raise ConfigError(
                f"{label}: expected a list of phases, got {raw!r}; write null for no curriculum"
            )
        phases = tuple(_read_phase(value, f"{label}[{i}]") for i, value in enumerate(raw))
        if phases[0].at_samples != 0:
            raise ConfigError(f"{label}[0].at_samples {phases[0].at_samples}: the first phase starts at 0")
        for i, (a, b) in enumerate(itertools.pairwise(phases), 1):
            if b.at_samples <= a.at_samples:
                raise ConfigError(
                    f"{label}[{i}].at_samples {b.at_samples}: must lie above the {a.at_samples} of the phase before"
                )
        return cls(phases, label)

    def to_plain(self) -> list[dict]:
        """Plain lists, mappings and numbers that `from_plain` reads back."""
        return [_plain_phase(phase) for phase in self.phases]

    def episodes_with_share(self) -> int:
        """Episode buckets that some phase gives a weight, as far as that is known without the corpus."""
        everything = np.ones((len(TIERS), len(EPISODE_BUCKETS)), bool)
        tables = [phase.shares(everything) for phase in self.phases if phase.episodes or phase.table]
        return int(sum(tables, 0 * everything).any(axis=0).sum())


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Which images when: a mixture of tiers, episode buckets and captions that changes with the images seen."""

    phases: Phases | None = knob(
        None, "keyframes of the mixture (YAML, see data/curriculum.py); none: every image is equally likely"
    )
    floor_frac: float = knob(
        0.02, "smallest share of an episode bucket that this or an earlier phase gave a share (own choice)"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.floor_frac < 1:  # also refuses NaN
            raise ConfigError(f"curriculum.floor_frac {self.floor_frac}: 0 or more, and below 1")
        if self.phases is not None:
            check_floor(self.floor_frac, self.phases.episodes_with_share())


def check_floor(floor_frac: float, episodes: int) -> None:
    """Refuse a floor that so many episode buckets cannot all have (ConfigError)."""
    if floor_frac * episodes > 1 + _ROUNDING:
        raise ConfigError(
            f"curriculum.floor_frac {floor_frac}: {episodes} episode buckets have a share at some time, and "
            f"{episodes} x {floor_frac} is more than 1; give at most {1 / episodes:.4g}"
        )


def _read_phase(raw: Any, label: str) -> Phase:
    if not isinstance(raw, dict):
        raise ConfigError(f"{label}: expected a mapping with at_samples and a table, got {raw!r}")
    for key in raw:
        if key not in _KEYS:
            raise ConfigError(
                f"{label}: unknown key '{key}'{nearest(str(key), _KEYS)}; one of {', '.join(_KEYS)}"
            )
    given = {key: value for key, value in raw.items() if value is not None}
    if "at_samples" not in given:
        raise ConfigError(f"{label}.at_samples is required: from how many images seen on the phase holds")
    at_samples = coerce(given["at_samples"], int, f"{label}.at_samples")
    if not 0 <= at_samples < 1 << 53:  # what float64 counts exactly
        raise ConfigError(f"{label}.at_samples {at_samples}: 0 or more, and below 2**53")
    factors = [key for key in ("tiers", "episodes") if key in given]
    if ("table" in given) == bool(factors):
        found = f"both table and {factors[0]}" if factors else "neither"
        raise ConfigError(f"{label}: has {found}; give table, or tiers and episodes")
    phase = {
        key: _weights(given[key], TIERS if key == "tiers" else EPISODE_BUCKETS, f"{label}.{key}")
        for key in factors
    }
    if "table" in given:
        phase["table"] = _table(given["table"], f"{label}.table")
    if "captions" in given:
        phase["captions"] = _weights(given["captions"], CAPTION_CLASSES, f"{label}.captions")
    if "caption_drop_frac" in given:
        drop = coerce(given["caption_drop_frac"], float, f"{label}.caption_drop_frac")
        if not 0 <= drop <= 1:
            raise ConfigError(f"{label}.caption_drop_frac {drop}: between 0 and 1")
        phase["caption_drop_frac"] = drop
    return Phase(at_samples, **phase)


def _table(raw: Any, label: str) -> tuple[tuple[str, Weights], ...]:
    _check_names(raw, TIERS, label)
    rows = tuple(
        (tier, _weights(row, EPISODE_BUCKETS, f"{label}.{tier}", may_be_zero=True))
        for tier, row in sorted(raw.items())
    )
    _check_total([weight for _, row in rows for _, weight in row], label)
    return rows


def _weights(raw: Any, allowed: tuple[str, ...], label: str, may_be_zero: bool = False) -> Weights:
    _check_names(raw, allowed, label)
    weights = []
    for name, value in raw.items():
        weight = coerce(value, float, f"{label}.{name}")
        if not 0 <= weight < math.inf:  # also refuses NaN
            raise ConfigError(f"{label}.{name} {weight}: a weight is a finite number, 0 or more")
        weights.append((name, weight))
    if not may_be_zero:
        _check_total([weight for _, weight in weights], label)
    return tuple(sorted(weights))  # in one order, so that equal settings compare equal


def _check_names(raw: Any, allowed: tuple[str, ...], label: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{label}: expected a mapping of {allowed[0]}, {allowed[1]} ... to weights, got {raw!r}"
        )
    for name in raw:
        if name not in allowed:
            raise ConfigError(
                f"{label}: unknown name '{name}'{nearest(str(name), allowed)}; one of {', '.join(allowed)}"
            )


def _check_total(weights: list[float], label: str) -> None:
    total = sum(weights)
    if not 0 < total < math.inf:
        raise ConfigError(
            f"{label}: the weights add up to {total}; at least one must be above 0, and the sum finite"
        )


def _plain_phase(phase: Phase) -> dict:
    plain: dict[str, Any] = {"at_samples": phase.at_samples}
    for key in ("tiers", "episodes", "captions"):
        if getattr(phase, key) is not None:
            plain[key] = dict(getattr(phase, key))
    if phase.table is not None:
        plain["table"] = {tier: dict(row) for tier, row in phase.table}
    if phase.caption_drop_frac is not None:
        plain["caption_drop_frac"] = phase.caption_drop_frac
    return plain
