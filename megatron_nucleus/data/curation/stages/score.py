"""Scores of images by a scorer, and images dropped by a score.

One line of a recipe per scorer, each with another ``as``:

    - {score: {kind: image_statistics}}
    - {score: {as: aesthetic, kind: aesthetic, model: google/siglip2-base-patch16-256, model_revision: COMMIT,
               head: aesthetic.safetensors}}
    - {score: {as: watermark, kind: watermark, model: models/siglip2, max: 0.8}}
    - {score: {as: alignment, kind: alignment, model: models/siglip2}}

Each adds an entry to ``scores``: the name of the score (``metric``, else the kind), the model with its revision, the
value. ``alignment`` also writes the fit of every caption, by which captions are later kept, refined or replaced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_nucleus.data import index
from megatron_nucleus.data.curation import scorers
from megatron_nucleus.data.curation.scorers import (
    embedding,
    head,
    model_files,
    own_class,
    protocol,
    settings,
    statistics,
)
from megatron_nucleus.data.curation.scorers.protocol import Scored, Scorer, reduced
from megatron_nucleus.data.curation.scorers.settings import KINDS, REASONS, ScorerConfig
from megatron_nucleus.data.curation.stage import Drop, Row, row_stage
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class ScoreConfig(ScorerConfig):
    """Which scorer judges, under which name, and which images its score drops."""

    metric: str = knob("", "name of the score [the kind; of an own scorer, its name]")
    min: float | None = knob(None, "smaller scores are dropped; none: the kind's threshold, where it has one")
    max: float | None = knob(None, "larger scores are dropped; none: no limit")
    drop: bool = knob(True, "false: only score, drop nothing")
    reason: str = knob("", f"of dropped images: {', '.join(REASONS)} [the kind's]")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min", "max"):
            if (limit := getattr(self, name)) is not None and not math.isfinite(limit):
                raise ConfigError(f"{name} {limit}: a finite number, or none")
        low, high = self.limits
        if low is not None and high is not None and low > high:
            raise ConfigError(f"min {low} is above max {high}: every image would be dropped")
        if not self.drop and (self.min is not None or self.max is not None):
            raise ConfigError("drop false: min and max do nothing then; leave them out")
        if self.reason and self.reason not in REASONS:
            raise ConfigError(
                f"reason {self.reason}: unknown{nearest(self.reason, REASONS)}; one of {', '.join(REASONS)}"
            )

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Smallest and largest score that stays; None: no limit."""
        if not self.drop:
            return None, None
        published = None if self.own else KINDS[self.kind].min
        return (published if self.min is None else self.min), self.max

    @property
    def drop_reason(self) -> str:
        """Why an image is dropped, one of `REASONS`."""
        return self.reason or ("low_score" if self.own else KINDS[self.kind].reason)


def score_identity(config: ScoreConfig) -> str:
    """As `scorers.scorer_identity`; also refuses a threshold that no rating of the head reaches.

    Raises:
        ConfigError: as there, or such a threshold.
    """
    if config.head and not config.own:
        info = head.load_head(config.head).info
        low, high = config.limits
        if (low is not None and low > info.rating_max) or (high is not None and high < info.rating_min):
            raise ConfigError(
                f"kind {config.kind}: limits {low} to {high} lie outside the ratings that head {config.head} learnt, "
                f"{info.rating_min:g} to {info.rating_max:g}; give min and max on that scale, or drop: false"
            )
    return scorers.scorer_identity(config)


def written_scores(config: ScoreConfig) -> tuple[str, ...] | None:
    """The name under which the score is stored; None where only the object of an own class knows it."""
    if config.own and not config.metric:
        return None
    return (config.metric or config.kind,)


@row_stage(
    ScoreConfig,
    reads=("scores", "captions"),
    adds={"scores": pa.list_(index.SCORE_TYPE), "captions": pa.list_(index.CAPTION_TYPE)},
    rejects=REASONS,
    batch_rows=32,  # own choice: fills a GPU with a model of base size, and 32 decoded pictures fit into memory
    identity=score_identity,
    gpus=scorers.scorer_gpus,
    modules=(scorers, embedding, head, model_files, own_class, protocol, settings, statistics),
    writes_scores=written_scores,
)
def score(rows: Sequence[Row], config: ScoreConfig) -> list[Mapping[str, Any] | Drop]:
    """One entry more in ``scores``; the captions' fit, from a scorer that judges them; a `Drop` outside the limits.

    An image without a value (alignment, no captions) gets no entry and stays. A score of the same metric that a row
    brings along is replaced: the name stands for one number.
    """
    scorer = scorers.make_scorer(config)
    texts = [[caption["text"] for caption in row["captions"] or ()] for row in rows]
    pictures = [reduced(row.picture(scorer.side_px), scorer.side_px) for row in rows]
    results = scorer.score(pictures, texts)
    _check_results(config, results, texts)
    return [_result(row, scored, scorer, config) for row, scored in zip(rows, results, strict=True)]


def _check_results(config: ScoreConfig, results: Sequence[Scored], texts: Sequence[Sequence[str]]) -> None:
    """A wrong number of results is a mistake in the scorer; a number that is not finite costs its image."""
    if len(results) != len(texts):
        raise ConfigError(f"kind {config.kind}: it gave {len(results)} scores for {len(texts)} images")
    for scored, own in zip(results, texts, strict=True):
        if scored.captions is not None and len(scored.captions) != len(own):
            raise ConfigError(
                f"kind {config.kind}: it gave {len(scored.captions)} numbers for {len(own)} captions"
            )
        numbers = [*(scored.captions or ()), *(() if scored.value is None else (scored.value,))]
        # float32 is how they are stored; `not` is what a nan needs.
        if not all(abs(number) <= float(np.finfo(np.float32).max) for number in numbers):
            raise ValueError(f"kind {config.kind}: a score of {numbers}, not finite")


def _result(row: Row, scored: Scored, scorer: Scorer, config: ScoreConfig) -> Mapping[str, Any] | Drop:
    metric = config.metric or (scorer.name if config.own else config.kind)
    scores = [dict(entry) for entry in row["scores"] or () if entry["scorer"] != metric]
    captions = [dict(caption) for caption in row["captions"] or ()]
    if scored.captions is not None:
        captions = [
            {**caption, "alignment": float(np.float32(fit))}
            for caption, fit in zip(captions, scored.captions, strict=True)
        ]
    if scored.value is not None:
        value = float(np.float32(scored.value))
        low, high = config.limits
        # Limits as float32, as scores are stored: a score of 0.65 is not below 0.65.
        if (low is not None and value < np.float32(low)) or (high is not None and value > np.float32(high)):
            return Drop(config.drop_reason, f"{metric} {value:.4g}, limits {_limits(low, high)}")
        scores.append({"scorer": metric, "revision": f"{scorer.name}@{scorer.revision}", "value": value})
    return {"scores": scores, "captions": captions}


def _limits(low: float | None, high: float | None) -> str:
    return f"{'none' if low is None else f'{low:g}'} to {'none' if high is None else f'{high:g}'}"
