"""The caption gate: what describes its picture stays, what half does is refined, the rest is written anew.

Per image, by the best ``alignment`` (image-text score) that an earlier stage measured on its captions:

- above ``keep_above``: **keep**. Nothing is written.
- from ``synthesise_below`` to ``keep_above``: **refine**. The captioner rewrites that best caption with the picture
  before it; the result, source ``refined``, goes before it, and the original stays as it was.
- below ``synthesise_below``, or no caption: **synthesise**. One caption per class of ``lengths``, source
  ``synthetic``, goes first. The originals stay last with their alignment, so that a mixture can weigh them; those
  measured below ``drop_below`` go.
- captions, none of which is above ``keep_above``, and one of which was never measured: **unknown**. Nothing is
  written: a caption is not thrown away unseen.

Without a captioner the gate still says which is which. New captions have no alignment: they were not measured yet.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation.captioners import (
    desk,
    openai_http,
    prompts,
    protocol,
    settings,
    vision_language,
)
from megatron_nucleus.data.curation.captioners.desk import Wish
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply
from megatron_nucleus.data.curation.captions import LENGTH_CLASSES, length_class
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS, Drop, Row, row_stage
from megatron_nucleus.data.index import CAPTION_TYPE
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest

GATES = ("keep", "refine", "synthesise", "unknown")
COST_TYPE = pa.struct([("tokens_in", pa.int64()), ("tokens_out", pa.int64()), ("cost", pa.float64())])


@dataclasses.dataclass(frozen=True)
class RecaptionConfig(settings.CaptionerConfig):
    """Which captions stay, which are refined and which are written anew, and by whom."""

    # Both from Nucleus-Image's data-engineering blog.
    keep_above: float = knob(0.65, "an image with a caption aligned better than this keeps its captions")
    synthesise_below: float = knob(0.30, "an image whose best caption is aligned worse is described anew")
    lengths: tuple[str, ...] = knob(
        LENGTH_CLASSES, "length classes to write for an image that is described anew"
    )
    refine_length: str = knob("medium", "length class of a refined caption", choices=LENGTH_CLASSES)
    drop_below: float = knob(
        0.0, "of an image described anew, drop captions aligned worse than this; 0 keeps them all"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.synthesise_below <= self.keep_above <= 1:
            raise ConfigError(
                f"synthesise_below {self.synthesise_below:g}, keep_above {self.keep_above:g}: must rise, within 0 to 1"
            )
        if not 0 <= self.drop_below <= self.synthesise_below:
            raise ConfigError(
                f"drop_below {self.drop_below:g}: from 0 to synthesise_below ({self.synthesise_below:g})"
            )
        for name in self.lengths:
            if name not in LENGTH_CLASSES:
                raise ConfigError(
                    f"lengths: {name!r}{nearest(name, LENGTH_CLASSES)}; of {', '.join(LENGTH_CLASSES)}"
                )
        if not self.lengths or len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"lengths {' '.join(self.lengths) or 'none'}: one or more, each once")


class Verdict(NamedTuple):
    """gate: one of `GATES`. best: number of the caption to refine, None unless the gate is ``refine``."""

    gate: str
    best: int | None = None


def judge(captions: Sequence[Mapping[str, Any]], config: RecaptionConfig) -> Verdict:
    """The gate, from captions as in the index (`CAPTION_TYPE`). A caption too long to refine counts as none.

    Raises:
        ValueError: an alignment that is no number.
    """
    measured = [(c["alignment"], -n) for n, c in enumerate(captions) if c["alignment"] is not None]
    if any(math.isnan(alignment) for alignment, _ in measured):
        raise ValueError("a caption's alignment is NaN; the stage that measures it is broken")
    best, number = max(measured, default=(None, 0))  # of equals the first
    # The column holds 32-bit numbers: 0.3 is stored a little above 0.3.
    if best is not None and np.float32(best) > np.float32(config.keep_above):
        return Verdict("keep")
    if len(measured) < len(captions):
        return Verdict("unknown")
    if best is None or np.float32(best) < np.float32(config.synthesise_below):
        return Verdict("synthesise")
    if len(captions[-number]["text"]) > prompts.MAX_ORIGINAL_CHARACTERS:
        return Verdict("synthesise")
    return Verdict("refine", -number)


@row_stage(
    RecaptionConfig,
    reads=(*REFERENCE_COLUMNS, "captions"),
    adds={"captions": pa.list_(CAPTION_TYPE), "caption_gate": pa.string(), "caption_cost": COST_TYPE},
    quarantines=("missing_caption",),
    failures=("captioner_failed",),
    batch_rows=32,  # enough for `concurrency` requests in flight, few enough for pictures in memory; own choice
    identity=desk.identity,
    gpus=desk.gpus,
    check=desk.check,
    modules=(desk, openai_http, prompts, protocol, settings, vision_language),
)
def recaption(rows: Sequence[Row], config: RecaptionConfig) -> list[dict[str, Any] | Drop]:
    """The stage; see the module docstring. An image of which one caption fails is dropped for this time."""
    captions = [row["captions"] or [] for row in rows]
    verdicts = [judge(one, config) for one in captions]
    counter = desk.open_desk(config)
    if counter is None:
        return [_as_it_is(one, verdict) for one, verdict in zip(captions, verdicts, strict=True)]
    wishes = [_wishes(*job, config) for job in zip(rows, captions, verdicts, strict=True)]
    answers = iter(counter.answer([wish for of_row in wishes for wish in of_row]))
    name = counter.captioner.name, counter.captioner.revision
    return [
        _finished(one, verdict, of_row, [next(answers) for _ in of_row], name, config)
        for one, verdict, of_row in zip(captions, verdicts, wishes, strict=True)
    ]


def _as_it_is(captions: list[dict], verdict: Verdict) -> dict[str, Any] | Drop:
    if not captions:
        return Drop("missing_caption", "no caption, and no captioner to write one (captioner: none)")
    return _columns(captions, verdict.gate, 0, 0, 0.0)


def _wishes(row: Row, captions: list[dict], verdict: Verdict, config: RecaptionConfig) -> list[Wish]:
    """What the captioner has to write for one image."""
    if verdict.gate not in ("refine", "synthesise"):
        return []
    digest = hashlib.sha256(row.payload()).hexdigest()
    picture = functools.cache(functools.partial(row.picture, config.image_side_px))
    if verdict.best is not None:
        return [Wish(digest, picture, "refine", config.refine_length, captions[verdict.best]["text"])]
    return [Wish(digest, picture, "synthesise", length) for length in config.lengths]


def _finished(
    captions: list[dict],
    verdict: Verdict,
    wishes: Sequence[Wish],
    answers: Sequence[Reply | Failure],
    name: tuple[str, str | None],
    config: RecaptionConfig,
) -> dict[str, Any] | Drop:
    replies = []
    for wish, answer in zip(wishes, answers, strict=True):
        if isinstance(answer, Failure):
            return Drop("captioner_failed", f"{wish.task} {wish.length}: {answer.detail}")
        replies.append(answer)
    new = [_caption(wish, reply, *name) for wish, reply in zip(wishes, replies, strict=True)]
    if verdict.best is not None:
        captions = _unique([*captions[: verdict.best], *new, *captions[verdict.best :]], prefer=captions)
    elif verdict.gate == "synthesise":
        limit = np.float32(config.drop_below)
        captions = _unique([*new, *(c for c in captions if np.float32(c["alignment"]) >= limit)], prefer=())
    tokens_in, tokens_out = sum(r.tokens_in for r in replies), sum(r.tokens_out for r in replies)
    return _columns(captions, verdict.gate, tokens_in, tokens_out, config.cost(tokens_in, tokens_out))


def _caption(wish: Wish, reply: Reply, model: str, revision: str | None) -> dict[str, Any]:
    """One caption of the index. Its class is the one it came out as, whatever was asked for."""
    return {
        "text": reply.text,
        "length_class": length_class(reply.text),
        "source": {"refine": "refined", "synthesise": "synthetic"}[wish.task],
        "model": model,
        "model_revision": reply.revision or revision,
        "prompt_hash": prompts.prompt_hash(wish.task, wish.length),
        "alignment": None,
    }


def _unique(captions: Sequence[dict], prefer: Sequence[dict]) -> list[dict]:
    """Captions in order, each text once: of equal ones that in ``prefer``, else the first."""
    kept = {c["text"]: c for c in reversed([*prefer, *captions])}
    return list({c["text"]: kept[c["text"]] for c in captions}.values())


def _columns(captions: list[dict], gate: str, tokens_in: int, tokens_out: int, cost: float) -> dict[str, Any]:
    return {
        "captions": captions,
        "caption_gate": gate,
        "caption_cost": {"tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost},
    }
