"""Prompts of a job: encoded once each, projected to keys and values once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_nucleus.data.encoders import TextEncoder
from megatron_nucleus.inference.sampler import stack_text
from megatron_nucleus.types import TextFeatures, TextKV
from megatron_nucleus.utils.errors import ConfigError


class Job(NamedTuple):
    """One picture to draw. prompt, negative: "" is the empty prompt."""

    prompt: str
    negative: str
    seed: int


class TextMemory:
    """Text of some jobs: every distinct prompt encoded once, its keys and values kept while still needed.

    Args:
        project: features of one text -> its keys and values.
        jobs: pictures to draw, in order.
        first: number of the first of them, for messages.
        guided: whether negative prompts are needed.
        batch_size: texts encoded at once.

    Raises:
        ConfigError: a prompt is too long, naming it.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        project: Callable[[TextFeatures], TextKV],
        jobs: Sequence[Job],
        first: int,
        guided: bool,
        batch_size: int,
    ):
        self.project, self.jobs, self.guided = project, jobs, guided
        self.last_use: dict[str, int] = {}
        labels: dict[str, str] = {}
        for i, job in enumerate(jobs):
            labels.setdefault(job.prompt, f"prompt {first + i} (counting from 0)")
            if guided:
                labels.setdefault(job.negative, f"negative prompt {first + i} (counting from 0)")
            self.last_use |= {job.prompt: i, job.negative: i}
        self.features = encode_each(text_encoder, labels, batch_size)
        self.kv: dict[str, TextKV] = {}

    def batch(self, at: int, count: int) -> tuple[TextKV, TextKV | None]:
        """Keys and values of ``count`` jobs from number ``at``: (positive, negative or None)."""
        jobs = self.jobs[at : at + count]
        positive = stack_text([self._of(job.prompt) for job in jobs])
        negative = stack_text([self._of(job.negative) for job in jobs]) if self.guided else None
        for text in [t for t in self.kv if self.last_use[t] < at + count]:
            del self.kv[text]
        return positive, negative

    def _of(self, text: str) -> TextKV:
        if text not in self.kv:
            self.kv[text] = self.project(self.features[text])
        return self.kv[text]


def encode_each(
    text_encoder: TextEncoder, labels: dict[str, str], batch_size: int
) -> dict[str, TextFeatures]:
    """Features of each text as a batch of one, without its padding.

    Args:
        labels: what to call each text in a message.

    Raises:
        ConfigError: a text is too long, naming it.
    """
    texts, out = list(labels), {}
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        try:
            features = text_encoder.encode(part)
        except ConfigError:
            _name_culprit(text_encoder, {t: labels[t] for t in part})
            raise
        for i, text in enumerate(part):
            out[text] = _one(features, i)
    return out


def _name_culprit(text_encoder: TextEncoder, labels: dict[str, str]) -> None:
    for text, label in labels.items():
        try:
            text_encoder.encode([text])
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error


def _one(features: TextFeatures, i: int) -> TextFeatures:
    """Row ``i`` without its padding, which stands at the end (`types.TextFeatures`)."""
    features_LU = features.features_BLU[i]
    if features.mask_BL is None:
        return TextFeatures(features_LU[None])
    length = int(features.mask_BL[i].sum())
    return TextFeatures(features_LU[None, :length])
