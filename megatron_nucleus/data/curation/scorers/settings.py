"""Which kinds of scorers there are, and the settings that choose one."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_nucleus.data.curation.scorers import statistics
from megatron_nucleus.data.curation.scorers.embedding import DEVICES, DTYPES
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest


class Kind(NamedTuple):
    """A built-in kind of scorer.

    ways: how it may come to its value, the keys of `NEEDS`. reason: of dropped images. min: published threshold.
    prompts, against: default texts (own choice: no wording is published).
    """

    ways: tuple[str, ...]
    reason: str = "low_score"
    min: float | None = None
    prompts: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


# What each way to a value needs; it takes nothing else.
NEEDS = {
    "statistics": (),
    "head": ("model", "head"),
    "prompts": ("model", "prompts", "against"),
    "captions": ("model",),
}
KINDS = {
    "image_statistics": Kind(("statistics",)),
    # The published corpus keeps 5.0 and more of its SigLIP head. No other threshold of a scorer is published, so none
    # of the others drops anything until a recipe gives one.
    "aesthetic": Kind(("head",), "low_aesthetic", min=5.0),
    "safety": Kind(
        ("prompts", "head"),
        "unsafe",
        prompts=("a picture that is safe for everybody",),
        against=("a picture with nudity", "a picture of violence and blood"),
    ),
    "watermark": Kind(
        ("prompts", "head"),
        "watermark",
        prompts=("a photo with a watermark",),
        against=("a photo without a watermark",),
    ),
    "alignment": Kind(("captions",), "low_alignment"),
    "rating": Kind(("head",)),
    "prompts": Kind(("prompts",)),
}
REASONS = tuple(dict.fromkeys(kind.reason for kind in KINDS.values()))


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """Which scorer, and what it needs."""

    kind: str = knob(statistics.NAME, f"one of {', '.join(KINDS)}; or FILE.py:CLASS of your own")
    model: str = knob("", "folder or hub id of a SigLIP or CLIP model; for a head also image_statistics")
    model_revision: str = knob("", "commit of a hub model (40 hex digits)")
    head: str = knob("", "file from tools/train_scorer.py, trained on this model")
    prompts: tuple[str, ...] = knob((), "texts of what is looked for (safety, watermark, prompts)")
    against: tuple[str, ...] = knob((), "texts of the opposite")
    device: str = knob("auto", "where a model runs; auto: a GPU where there is one", choices=DEVICES)
    dtype: str = knob("auto", "of a model; auto: float32 on a CPU, float16 on a GPU", choices=DTYPES)

    def __post_init__(self) -> None:
        if self.own:
            return  # a class of the user's checks its settings itself
        label = f"kind {self.kind}"
        if self.kind not in KINDS:
            guess = nearest(self.kind, KINDS)
            raise ConfigError(f"{label}: unknown{guess}; one of {', '.join(KINDS)}, or FILE.py:CLASS")
        given = {"model": self.model, "head": self.head, "prompts": self.texts[0], "against": self.texts[1]}
        for name, value in given.items():
            needed = name in NEEDS[self.way]
            if needed and not value:
                raise ConfigError(f"{label}: needs {name}{_WHERE_FROM.get(name, '')}")
            if value and not needed:
                raise ConfigError(f"{label}: takes no {name}; leave it out, or choose another kind")
        if self.model == statistics.NAME and self.way != "head":
            raise ConfigError(f"{label}: {statistics.NAME} knows no texts; give a SigLIP or CLIP model")
        if self.model_revision and self.model in ("", statistics.NAME):
            raise ConfigError(f"model_revision {self.model_revision}: only a hub model has one")

    @property
    def own(self) -> bool:
        """Whether ``kind`` names a class of the user's."""
        return ":" in self.kind

    @property
    def way(self) -> str:
        """How a built-in kind comes to its value, one of `NEEDS`."""
        ways = KINDS[self.kind].ways
        return "head" if self.head and "head" in ways else ways[0]

    @property
    def texts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``prompts`` and ``against``; the kind's own where it works with texts and neither is given."""
        if self.way != "prompts" or self.prompts or self.against:
            return self.prompts, self.against
        return KINDS[self.kind].prompts, KINDS[self.kind].against


_WHERE_FROM = {
    "model": ", a folder or a hub id",
    "head": "; tools/train_scorer.py makes one from ratings",
    "prompts": ": prompts and against go together",
    "against": ": prompts and against go together",
}
