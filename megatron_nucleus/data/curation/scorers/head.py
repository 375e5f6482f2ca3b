"""A small head on picture vectors, trained from ratings: ridge regression, in closed form.

Why ridge and no network: it is one formula, so equal ratings give an equal head; its one free number, the strength of
the penalty, is chosen by the error on rows left out, which for ridge costs nothing extra; and a few hundred ratings
do not carry more. numpy is enough.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_nucleus.data.curation.scorers.protocol import FeatureModel, Scored
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import sha256_file, write_atomic

FORMAT = "megatron_nucleus.scorer_head.1"
# Penalties that are tried, relative to the mean variance of a direction of the vectors (own choice: from no penalty
# to speak of to nearly the mean of the ratings).
PENALTIES = tuple(10.0**exponent for exponent in np.arange(-6, 4.01, 0.5).tolist())


@dataclasses.dataclass(frozen=True)
class HeadInfo:
    """Where a head comes from and what it is worth; stored with it.

    Attributes:
        model, model_revision, checksum: of the `FeatureModel` whose vectors it rates. dim: their width.
        rows: ratings that it was trained on. penalty: of ridge, chosen among `PENALTIES`.
        folds: of the cross-validation that gave the next three.
        rmse, spearman: on rows left out, in units of the ratings, and rank correlation in [-1, 1].
        baseline_rmse: of always saying the mean.
        rating_min, rating_max: of the ratings.
    """

    model: str
    model_revision: str
    checksum: str
    dim: int
    rows: int
    penalty: float
    folds: int
    rmse: float
    spearman: float
    baseline_rmse: float
    rating_min: float
    rating_max: float


class Head(NamedTuple):
    """rating = vector @ weights + intercept. weights: float64 [dim]."""

    weights: np.ndarray
    intercept: float
    info: HeadInfo

    def rate(self, vectors: np.ndarray) -> np.ndarray:
        """Ratings float64 [rows] of vectors [rows, dim]; not limited to the range of the ratings it learnt from."""
        return predict(vectors, self.weights, self.intercept)


class HeadScorer:
    """`Scorer`: a head's rating of a picture.

    Raises:
        ConfigError: the head was trained on vectors of another model.
    """

    def __init__(self, features: FeatureModel, head: Head, head_revision: str):
        check_fits(head.info, features.name, features.checksum)
        self._features, self._head = features, head
        self.name, self.side_px = features.name, features.side_px
        self.revision = f"{features.revision}+head:{head_revision}"

    def score(self, pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> list[Scored]:
        """See `Scorer`; captions are not looked at."""
        return [Scored(float(rating)) for rating in self._head.rate(self._features.embed(pictures))]


class Quality(NamedTuple):
    """Errors on rows that were left out. rmse, baseline_rmse: in units of the ratings. spearman: in [-1, 1]."""

    rmse: float
    baseline_rmse: float
    spearman: float


def fit_ridge(vectors: np.ndarray, ratings: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Weights float64 [dim], intercept and penalty that predict best on rows left out one at a time.

    vectors: [rows, dim], ratings: [rows]. The error of a row left out is its residual / (1 - leverage), exactly, so
    all penalties are judged from one decomposition. The intercept is not penalised.

    Raises:
        DataError: the vectors are all equal.
    """
    vectors, ratings = np.asarray(vectors, np.float64), np.asarray(ratings, np.float64)
    centre, level = vectors.mean(axis=0), ratings.mean()
    left, singular, right = np.linalg.svd(vectors - centre, full_matrices=False)
    energy = singular**2
    # Centred rows span at most rows - 1 directions; what is left over of the others is rounding.
    alive = energy > energy.max(initial=0.0) * 1e-20
    if not alive.any() or energy.max() < 1e-20:
        raise DataError("the pictures' vectors are all equal: there is nothing to learn from")
    left, singular, energy, right = left[:, alive], singular[alive], energy[alive], right[alive]
    projected = left.T @ (ratings - level)
    scale = energy.mean()
    best = (np.inf, 0.0)
    for relative in PENALTIES:
        kept = energy / (energy + relative * scale)
        residuals = ratings - level - left @ (kept * projected)
        leverage = 1 / len(ratings) + (left**2) @ kept
        if leverage.max() > 1 - 1e-9:  # a row that decides its own prediction says nothing of the others
            continue
        error = float(np.mean((residuals / (1 - leverage)) ** 2))
        best = min(best, (error, relative * scale))
    penalty = best[1]
    weights = right.T @ (singular / (energy + penalty) * projected)
    return weights, float(level - centre @ weights), float(penalty)


def predict(vectors: np.ndarray, weights: np.ndarray, intercept: float) -> np.ndarray:
    """float64 [rows]: row by row the same whatever rows come with it."""
    return (np.asarray(vectors, np.float64) * weights).sum(axis=1) + intercept


def cross_validate(vectors: np.ndarray, ratings: np.ndarray, fold: np.ndarray) -> Quality:
    """Each fold's rows rated by a head that saw the other folds only, its penalty included.

    fold: int [rows], the fold of each row.
    """
    predicted, mean = np.empty(len(ratings)), np.empty(len(ratings))
    for number in np.unique(fold):
        out = fold == number
        weights, intercept, _ = fit_ridge(vectors[~out], ratings[~out])
        predicted[out] = predict(vectors[out], weights, intercept)
        mean[out] = ratings[~out].mean()
    return Quality(
        rmse=float(np.sqrt(np.mean((predicted - ratings) ** 2))),
        baseline_rmse=float(np.sqrt(np.mean((mean - ratings) ** 2))),
        spearman=spearman(predicted, ratings),
    )


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where one of them is constant."""
    ranks = [_ranks(np.asarray(values)) for values in (one, other)]
    centred = [values - values.mean() for values in ranks]
    size = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / size) if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def save_head(path: str | Path, head: Head) -> None:
    """Write a head as safetensors (``weights`` and ``intercept``; `HeadInfo` as JSON in the metadata)."""
    from safetensors.numpy import save

    tensors = {"weights": np.asarray(head.weights, np.float64), "intercept": np.array([head.intercept])}
    info = json.dumps(dataclasses.asdict(head.info), sort_keys=True, allow_nan=False)
    # One key: safetensors does not promise an order of several.
    write_atomic(path, save(tensors, metadata={FORMAT: info}))


def load_head(path: str | Path) -> Head:
    """Read what `save_head` wrote.

    Raises:
        ConfigError: no such file, or no head.
        DataError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"head {path}: no such file; tools/train_scorer.py makes one")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"head {path}: damaged ({error}); train it again or copy it again") from error
    if FORMAT not in metadata:
        raise ConfigError(f"head {path}: not a head of tools/train_scorer.py (no {FORMAT} in its metadata)")
    try:
        info = HeadInfo(**json.loads(metadata[FORMAT]))
        weights, intercept = tensors["weights"], float(tensors["intercept"][0])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"head {path}: damaged ({error}); train it again or copy it again") from error
    if weights.shape != (info.dim,) or not np.isfinite([*weights, intercept]).all():
        raise DataError(
            f"head {path}: weights {weights.shape}, expected {info.dim} finite numbers; train it again"
        )
    return Head(weights, intercept, info)


def head_revision(path: str | Path) -> str:
    """16 hex digits of the file's checksum."""
    return sha256_file(path)[:16]


def check_fits(info: HeadInfo, model: str, checksum: str) -> None:
    """Refuse a head for vectors of another model.

    Raises:
        ConfigError: naming both.
    """
    if info.checksum != checksum:
        raise ConfigError(
            f"the head was trained on {info.model} ({info.model_revision}), not on this {model}; give that model, "
            "or train a head on this one (tools/train_scorer.py)"
        )


def fold_of(contents: Sequence[str], folds: int) -> np.ndarray:
    """Fold of each row, int64: by rank of the content's hash, so that neither order nor file names matter.

    contents: a distinct text for each row. Folds differ in size by one row at most.
    """
    keys = [hashlib.sha256(text.encode()).digest() for text in contents]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks % folds
