"""A curriculum on a corpus: the share of every cell of every aspect bucket at any number of images seen.

From the keyframes to the shares of one aspect bucket, in this order:

1. *Interpolation.* Each phase's weights are normalised to shares of sum 1; between two phases every cell's share
   is their linear mix over images seen, before the first and after the last it is constant.
2. *Floor.* Let s_e be the share of episode bucket e, and R those buckets that a phase up to now gave a share. While
   a bucket of R lies below the floor f, it is raised to f, and the shares of all buckets that were not raised are
   scaled by one factor so that the sum is 1 again (water-filling). Inside a bucket the tiers keep their ratio; a
   bucket whose share has fallen to 0 takes that of the last phase that gave it one, which is also the limit of the
   interpolation.
3. *Empty cells.* A cell without images in an aspect bucket passes its share to the bucket's other cells, in
   proportion to theirs. Tables are therefore exact where every bucket has every cell. A bucket of which no image
   would be drawn is refused.

Every sum runs over cells in a fixed order and nothing is reduced in parallel, so all machines get the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_nucleus.data.curriculum import CAPTION_CLASSES, CurriculumConfig, Phase, check_floor
from megatron_nucleus.data.dataset import Cell, Corpus
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.utils.errors import ConfigError

_SHAPE = (len(TIERS), len(EPISODE_BUCKETS))
log = logging.getLogger(__name__)


class CaptionMix(NamedTuple):
    """Shares of the caption classes (not normalised) among the captions that are kept, and of dropped ones."""

    short: float
    medium: float
    detailed: float
    drop_frac: float


class CaptionCurve:
    """The caption mixture over images seen: of the phases that name one, else of the data section."""

    def __init__(self, default: CaptionMix, phases: tuple[Phase, ...] = ()):
        self._at = np.array([phase.at_samples for phase in phases] or [0], np.int64)
        current = _normalised(default)
        keyframes = []
        for phase in phases:
            if phase.captions is not None:
                given = dict(phase.captions)
                classes = (given.get(name, 0.0) for name in CAPTION_CLASSES)
                current = _normalised(CaptionMix(*classes, current.drop_frac))
            if phase.caption_drop_frac is not None:
                current = current._replace(drop_frac=phase.caption_drop_frac)
            keyframes.append(current)
        self._keyframes = np.array(keyframes or [current]).T  # [4, phases]

    def at(self, samples: int) -> CaptionMix:
        """The mixture after so many images seen."""
        mixed, _ = _interpolate(self._keyframes, self._at, np.array([samples]))
        return CaptionMix(*mixed[:, 0].tolist())


class Mixture:
    """The shares of a curriculum on a corpus, see the module's docstring.

    Attributes:
        cells: aspect bucket -> {cell: its rows inside the bucket}, cells with both names alone, in corpus order.
    """

    def __init__(self, curriculum: CurriculumConfig, cells: Mapping[str, Mapping[Cell, range]], where: str):
        """cells: aspect bucket -> {cell: its rows inside the bucket}. where: names the data set in messages.

        Raises:
            ConfigError: data without tiers and episode buckets, a phase that names one which no image has, a floor
                too high for the corpus, or an aspect bucket of which some phase draws no image.
        """
        phases = curriculum.phases.phases
        label = curriculum.phases.label
        self.cells = {b: {c: r for c, r in rows.items() if None not in c} for b, rows in cells.items()}
        present = np.zeros(_SHAPE, bool)
        for rows in self.cells.values():
            for tier, episode in rows:
                present[TIERS.index(tier), EPISODE_BUCKETS.index(episode)] = True
        _check_named(phases, label, present, where)
        self._at = np.array([phase.at_samples for phase in phases], np.int64)
        tables = np.stack([phase.shares(present) for phase in phases], axis=-1)  # [tiers, episodes, phases]
        self._floor = curriculum.floor_frac
        self._keyframes = tables.reshape(-1, len(phases))
        self._reached = np.logical_or.accumulate(tables.any(axis=0), axis=-1)  # [episodes, phases]
        check_floor(self._floor, int(self._reached[:, -1].sum()))
        self._last_tiers = _last_tiers(tables)
        self._picked = {
            bucket: np.array(
                [TIERS.index(t) * _SHAPE[1] + EPISODE_BUCKETS.index(e) for t, e in rows], np.int64
            )
            for bucket, rows in self.cells.items()
        }
        self._unscored = {
            bucket: sum(len(r) for cell, r in rows.items() if None in cell) for bucket, rows in cells.items()
        }
        self._check_buckets(label, where)

    def shares(self, samples_V: np.ndarray) -> np.ndarray:
        """Shares of all cells (tier-major) after the floor, float64 [cells, V], for V numbers of images seen."""
        cells_CV, phase_V = _interpolate(self._keyframes, self._at, samples_V)
        cells_TEV = cells_CV.reshape(*_SHAPE, -1)
        episodes_EV = sum(cells_TEV)
        raised_EV = raise_to_floor(episodes_EV, self._reached[:, phase_V], self._floor)
        gone_EV = episodes_EV == 0
        factor_EV = np.divide(raised_EV, episodes_EV, out=np.zeros_like(raised_EV), where=~gone_EV)
        out_TEV = cells_TEV * factor_EV
        if (gone_EV & (raised_EV > 0)).any():
            out_TEV += self._last_tiers[:, :, phase_V] * np.where(gone_EV, raised_EV, 0.0)
        return out_TEV.reshape(cells_CV.shape)

    def bucket_shares(self, bucket: str, samples_V: np.ndarray) -> np.ndarray:
        """Shares of an aspect bucket's own cells (in the order of ``cells[bucket]``), float64 [cells, V], sum 1."""
        own_CV = self.shares(samples_V)[self._picked[bucket]]
        return own_CV / sum(own_CV)

    def warn(self) -> None:
        """Log what the corpus lacks: shares that go to other cells, and images that are never drawn."""
        keyframes_CP = self.shares(self._at)
        for bucket, picked in self._picked.items():
            missing = np.setdiff1d(np.flatnonzero(keyframes_CP.any(axis=1)), picked)
            if len(missing):
                log.warning(
                    "bucket %s has no images of %s: their share, up to %.1f %%, goes to its other cells",
                    *(bucket, ", ".join(cell_name(_cell(c)) for c in missing)),
                    100 * keyframes_CP[missing].sum(axis=0).max(),
                )
            if self._unscored[bucket]:
                log.warning(
                    "bucket %s: %d images have no tier or no episode bucket; the curriculum never draws them",
                    *(bucket, self._unscored[bucket]),
                )

    def _check_buckets(self, label: str, where: str) -> None:
        """Every bucket must draw something at every keyframe (then also between them)."""
        keyframes_CP = self.shares(self._at)
        for bucket, picked in self._picked.items():
            for phase, drawn in enumerate(keyframes_CP[picked].sum(axis=0)):
                if not drawn > 0:
                    has = ", ".join(map(cell_name, self.cells[bucket])) or "images without a tier only"
                    raise ConfigError(
                        f"{label}[{phase}]: draws no image of aspect bucket {bucket} of {where}, which has {has}; "
                        "give one of these cells a weight, or curate with a larger --min-bucket-images, so that "
                        "small buckets join others"
                    )


def corpus_mixture(curriculum: CurriculumConfig, corpus: Corpus) -> Mixture | None:
    """The curriculum on a data set, None without phases; ConfigError as `Mixture`."""
    if curriculum.phases is None:
        return None
    relative = {
        bucket: {
            cell: range(rows.start - corpus.start[bucket], rows.stop - corpus.start[bucket])
            for cell, rows in of_bucket.items()
        }
        for bucket, of_bucket in corpus.cells.items()
    }
    return Mixture(curriculum, relative, f"the data set {corpus.root}")


def cell_name(cell: Cell) -> str:
    """``A1/B2``; ``-`` stands for none."""
    return "/".join(part or "-" for part in cell)


def raise_to_floor(shares_EV: np.ndarray, reached_EV: np.ndarray, floor: float) -> np.ndarray:
    """Water-filling: no bucket of ``reached_EV`` below ``floor``, the others scaled to keep the sum of 1."""
    raised_EV, out_EV = np.zeros_like(reached_EV), shares_EV
    for _ in range(len(shares_EV)):
        low_EV = reached_EV & ~raised_EV & (out_EV < floor)
        if not low_EV.any():
            break
        raised_EV = raised_EV | low_EV
        rest_V = sum(np.where(raised_EV, 0.0, shares_EV))
        left_V = 1.0 - floor * sum(raised_EV.astype(np.float64))
        scale_V = np.divide(left_V, rest_V, out=np.zeros_like(rest_V), where=rest_V > 0)
        out_EV = np.where(raised_EV, floor, shares_EV * scale_V)
    return out_EV


def _interpolate(
    values_XP: np.ndarray, at_P: np.ndarray, samples_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values [X, V] between the keyframes of their columns, and the phase of every sample [V]."""
    phase_V = np.maximum(np.searchsorted(at_P, samples_V, side="right") - 1, 0)
    next_V = np.minimum(phase_V + 1, len(at_P) - 1)
    span_V = np.maximum(at_P[next_V] - at_P[phase_V], 1)
    t_V = np.where(next_V > phase_V, (samples_V - at_P[phase_V]) / span_V, 0.0)
    return values_XP[:, phase_V] * (1.0 - t_V) + values_XP[:, next_V] * t_V, phase_V


def _normalised(mix: CaptionMix) -> CaptionMix:
    total = mix.short + mix.medium + mix.detailed
    return CaptionMix(mix.short / total, mix.medium / total, mix.detailed / total, mix.drop_frac)


def _last_tiers(tables_TEP: np.ndarray) -> np.ndarray:
    """Tiers inside each episode bucket, of the last phase up to each that gave the bucket a share; sum 1 or 0."""
    out_TEP = np.zeros_like(tables_TEP)
    last_TE = np.zeros(_SHAPE)
    for phase in range(tables_TEP.shape[-1]):
        table_TE = tables_TEP[:, :, phase]
        total_E = sum(table_TE)
        ratio_TE = np.divide(table_TE, total_E, out=np.zeros(_SHAPE), where=total_E > 0)
        last_TE = np.where(total_E > 0, ratio_TE, last_TE)
        out_TEP[:, :, phase] = last_TE
    return out_TEP


def _cell(number: int) -> Cell:
    return TIERS[number // _SHAPE[1]], EPISODE_BUCKETS[number % _SHAPE[1]]


def _check_named(phases: tuple[Phase, ...], label: str, present: np.ndarray, where: str) -> None:
    if not present.any():
        raise ConfigError(
            f"{label}: {where} has no images with a tier and an episode bucket; put tier and episode_bucket into "
            "the .json beside each image and curate again, or set phases to null"
        )
    has = {name for i, name in enumerate(TIERS) if present[i].any()}
    has |= {name for i, name in enumerate(EPISODE_BUCKETS) if present[:, i].any()}
    for i, phase in enumerate(phases):
        for key, name in phase.named():
            if name not in has:
                raise ConfigError(
                    f"{label}[{i}].{key}.{name}: no image of {where} has it (there are {', '.join(sorted(has))}); "
                    "leave it out or give it weight 0"
                )
