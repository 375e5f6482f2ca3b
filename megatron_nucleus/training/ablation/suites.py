"""What a bench compares: suites of arms, each with runs of known length, and the hashes that tell settings apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.export.hf_keys import count_parameters
from megatron_nucleus.training import flops

Sections = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One training run of an arm; the parts of an arm follow each other, each from the one before.

    values: what tools/train.py reads. samples = steps x global batch. flops_per_image: forward and backward.
    """

    values: Sections
    shape: ModelShape
    steps: int
    samples: int
    flops_per_image: int
    kept_checkpoints: int

    @property
    def flops(self) -> int:
        return self.samples * self.flops_per_image


@dataclasses.dataclass(frozen=True)
class Merge:
    """How a derived arm averages its source's checkpoints; ema_decay: None = the tool's default."""

    last: int
    weights: str
    ema_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that is compared. A derived arm has no parts, but the arm ``source`` and ``merge``."""

    name: str
    changes: dict
    parts: tuple[Part, ...] = ()
    source: str | None = None
    merge: Merge | None = None

    @property
    def parameters(self) -> int:
        return count_parameters(self.parts[-1].shape)

    @property
    def active_parameters(self) -> int:
        return flops.active_parameter_count(self.parts[-1].shape)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A claim to look at: is ``arm`` better than ``baseline``?"""

    name: str
    claim: str
    baseline: str
    arm: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus of scenes; see tools/make_scenes.py and tools/curate.py for the sections."""

    count: int
    seed: int
    scenes: dict
    curation: dict

    @property
    def key(self) -> str:
        return digest(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Suite:
    """Arms at one budget. arms: in the order of the file. min_seeds: fewer than these are refused."""

    name: str
    corpus: Corpus
    evaluate: Sections
    text_tokens: int
    budget_flops: int
    seeds: tuple[int, ...]
    min_seeds: int
    baseline: str
    arms: dict[str, Arm]
    comparisons: tuple[Comparison, ...]

    def run_key(self, arm: Arm) -> str:
        """Hash of everything in the file that an arm's training depends on; part of its folder's name."""
        parts = [{"values": p.values, "steps": p.steps} for p in self.trained(arm).parts]
        return digest({"corpus": dataclasses.asdict(self.corpus), "parts": parts})

    def row_key(self, arm: Arm) -> str:
        """Hash of everything in the file that an arm's row depends on."""
        merge = dataclasses.asdict(arm.merge) if arm.merge else None
        return digest({"run": self.run_key(arm), "merge": merge, "evaluate": self.evaluate})

    def trained(self, arm: Arm) -> Arm:
        """The arm whose training an arm uses: its own, or its source's."""
        return self.arms[arm.source] if arm.source else arm

    def derived(self, name: str) -> list[Arm]:
        """The arms made from the checkpoints of arm ``name``."""
        return [arm for arm in self.arms.values() if arm.source == name]


def digest(value: object) -> str:
    """First 10 hex digits of the SHA-256 of a value as sorted JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
