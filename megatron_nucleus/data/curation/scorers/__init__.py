"""Scorers: numbers for images, by which curation may drop them, each stored with what gave it.

| kind             | value                                                    | needs                          |
|------------------|----------------------------------------------------------|--------------------------------|
| image_statistics | mean of five plain statistics of the pixels, 0 to 1      | nothing                        |
| aesthetic        | rating by a head                                         | model, head                    |
| safety           | probability that a picture is safe for everybody, 0 to 1 | model; or model and head       |
| watermark        | probability of a watermark, 0 to 1                       | model; or model and head       |
| alignment        | fit of the best caption; every caption gets its own      | model                          |
| rating           | rating by a head, of whatever it was trained on          | model, head                    |
| prompts          | probability of ``prompts`` and not ``against``, 0 to 1   | model, prompts, against        |
| FILE.py:CLASS    | a scorer of your own (`protocol.Scorer`)                 | what it likes                  |

A model is a SigLIP, SigLIP 2 or CLIP, a local folder or a hub id; for a head ``image_statistics`` will do, too.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from megatron_nucleus.data.curation.scorers import model_files, statistics
from megatron_nucleus.data.curation.scorers.embedding import AlignmentScorer, DualEncoder, PromptScorer
from megatron_nucleus.data.curation.scorers.head import HeadScorer, check_fits, head_revision, load_head
from megatron_nucleus.data.curation.scorers.own_class import check_members, load_class, source_checksum
from megatron_nucleus.data.curation.scorers.protocol import FeatureModel, Scored, Scorer
from megatron_nucleus.data.curation.scorers.settings import KINDS, REASONS, Kind, ScorerConfig
from megatron_nucleus.data.curation.scorers.statistics import ImageStatistics

__all__ = [
    "KINDS",
    "REASONS",
    "FeatureModel",
    "Kind",
    "Scored",
    "Scorer",
    "ScorerConfig",
    "make_scorer",
    "open_features",
    "scorer_gpus",
    "scorer_identity",
]


def make_scorer(config: ScorerConfig) -> Scorer:
    """The scorer of these settings, made once per process; a model is shared by all scorers that use it.

    Raises:
        ConfigError: as `ScorerConfig` and `DualEncoder`; a head of another model; a class that cannot be imported.
        DataError: a damaged model or head.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(ScorerConfig)}
    return _make_scorer(ScorerConfig(**values))  # equal for stages that differ in their thresholds only


@functools.lru_cache(maxsize=8)  # small beside the models, which `open_features` keeps
def _make_scorer(config: ScorerConfig) -> Scorer:
    if config.own:
        scorer = load_class(config.kind)(config)
        check_members(config.kind, scorer)
        return scorer
    if config.way == "statistics":
        return ImageStatistics()
    features = open_features(config.model, config.model_revision, config.device, config.dtype)
    if config.way == "head":
        return HeadScorer(features, load_head(config.head), head_revision(config.head))
    assert isinstance(features, DualEncoder)
    return PromptScorer(features, *config.texts) if config.way == "prompts" else AlignmentScorer(features)


def open_features(
    model: str, model_revision: str = "", device: str = "auto", dtype: str = "auto"
) -> FeatureModel:
    """The model of picture vectors: ``image_statistics``, or as `DualEncoder`; opened once per process."""
    return _open_features(model, model_revision, device, dtype)


@functools.lru_cache(maxsize=4)  # own choice: models are the large part of a worker's memory
def _open_features(model: str, model_revision: str, device: str, dtype: str) -> FeatureModel:
    if model == statistics.NAME:
        return ImageStatistics()
    return DualEncoder(model, model_revision, device, dtype)


def scorer_identity(config: ScorerConfig) -> str:
    """What decides the values besides the settings: checksums of local models, heads and own classes.

    Opens no model and fetches none, but finds most mistakes before the work starts.

    Raises:
        ConfigError: no such model, head or class; a head of another model.
        DataError: a damaged head, or a folder without weights.
    """
    facts, checksum = [], None
    if config.own:
        facts.append(source_checksum(load_class(config.kind)))
    elif config.model == statistics.NAME:
        checksum = ImageStatistics.checksum
    elif config.model:
        model_files.check_address(config.model, config.model_revision)
        if Path(config.model).is_dir():
            files = model_files.locate(config.model)
            checksum = files.checksum
            facts.append(files.revision)
    if config.head and not config.own:
        info = load_head(config.head).info
        if checksum is not None:  # that of a hub model is known once it is fetched
            check_fits(info, config.model, checksum)
        facts.append(head_revision(config.head))
    return " ".join(facts)


def scorer_gpus(config: ScorerConfig) -> float:
    """GPUs that one worker needs: 1 for a model that is to run on one, else 0.

    ``device: auto`` looks at the machine that asks.
    """
    model_runs = config.own or config.model not in ("", statistics.NAME)
    if not model_runs or config.device == "cpu":
        return 0.0
    if config.device == "cuda":
        return 1.0
    if config.own:
        return 0.0  # whether it uses a GPU is not known: say device: cuda
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0
