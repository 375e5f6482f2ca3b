"""The embedded benchmark's score: GenEval's rules on what the detector reads from the pixels.

A picture is correct when every requirement of its prompt's metadata holds and nothing else is in it. Folders
have GenEval's layout: ``<index>/metadata.jsonl`` (one JSON object) and ``<index>/samples/<number>.png``.
Source of the rules: djghosh13/geneval, evaluation/evaluate_images.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_nucleus.data.scenes import COLORS, HELD_OUT_SPLIT, RELATIONS, SHAPES, TAGS
from megatron_nucleus.evaluation.detector import MIN_SIDE_PX, Detection, detect
from megatron_nucleus.evaluation.error_bars import mean_of, share, spread
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest

POSITION_THRESHOLD = 0.1  # share of both boxes' sides that an offset must exceed (GenEval)
SKILL_OF_TAG = {
    "single_object": "single_object",
    "two_object": "two_objects",
    "counting": "counting",
    "colors": "colors",
    "position": "position",
    "color_attr": "color_attribution",
}


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """Whether a picture is what its prompt asks for, and what is wrong otherwise (empty when correct)."""

    correct: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class SampleScore:
    """One scored picture of a folder."""

    filename: str
    metadata: dict
    result: ScoreResult

    def row(self) -> dict:
        """The row of GenEval's results file."""
        return {
            "filename": self.filename,
            "tag": self.metadata["tag"],
            "prompt": self.metadata["prompt"],
            "correct": self.result.correct,
            "reason": self.result.reason,
        }


def score_image(pixels: np.ndarray, metadata: dict) -> ScoreResult:
    """Judge uint8 RGB pixels [height, width, 3] (both sides at least 32 px) by a prompt's metadata.

    Raises:
        ValueError: other pixels, or metadata that `check_metadata` refuses.
    """
    check_metadata(metadata)
    return judge(detect(pixels), metadata)


def judge(detections: list[Detection], metadata: dict) -> ScoreResult:
    """GenEval's rules on detections (best fit first), and no objects beyond those asked for."""
    include = metadata["include"]
    groups = _match(detections, include)
    reasons: list[str] = []
    for part, found in zip(include, groups, strict=True):
        if len(found) < part["count"]:
            what = " ".join(filter(None, (part.get("color"), part["class"])))
            reasons.append(f"expected {part['count']} {what}, found {len(found)}")
        elif "position" in part:
            relation, target = part["position"]
            reasons += _misplaced(found, groups[target], part["class"], relation)
    for part in metadata.get("exclude", ()):
        found = [d for d in detections if d.shape == part["class"] and part.get("color") in (None, d.color)]
        if len(found) >= part["count"]:
            reasons.append(f"expected fewer than {part['count']} {part['class']}, found {len(found)}")
    wanted = sum(part["count"] for part in include)
    if len(detections) > wanted:
        reasons.append(f"expected {wanted} objects in all, found {len(detections)}")
    return ScoreResult(not reasons, "; ".join(reasons))


def _match(detections: list[Detection], include: list[dict]) -> list[list[Detection]]:
    """The best detections of each requirement; none serves two. Those that name a colour choose first."""
    free = list(detections)
    groups: list[list[Detection]] = [[] for _ in include]
    for position in sorted(range(len(include)), key=lambda i: "color" not in include[i]):
        part = include[position]
        fitting = [d for d in free if d.shape == part["class"] and part.get("color") in (None, d.color)]
        groups[position] = fitting[: part["count"]]
        free = [d for d in free if not any(d is taken for taken in groups[position])]
    return groups


def _misplaced(found: list[Detection], targets: list[Detection], name: str, relation: str) -> list[str]:
    if not targets:
        return [f"no target for {name} to be {relation}"]
    for a in found:
        for b in targets:
            true = relations(a, b)
            if relation not in true:
                seen = " and ".join(sorted(true)) or "at the same place as"
                return [f"expected {name} {relation} its target, found {seen} it"]
    return []


def relations(a: Detection, b: Detection) -> set[str]:
    """All relations of a to b that hold: GenEval's rule with its threshold of 0.1."""
    offset, revised = [], []
    for low, high in ((0, 2), (1, 3)):
        gap = (a.box_px[low] + a.box_px[high] - b.box_px[low] - b.box_px[high]) / 2
        sides = a.box_px[high] - a.box_px[low] + b.box_px[high] - b.box_px[low]
        offset.append(gap)
        revised.append(math.copysign(max(abs(gap) - POSITION_THRESHOLD * sides, 0.0), gap))
    if all(abs(value) < 1e-3 for value in revised):
        return set()
    dx, dy = (value / math.hypot(*offset) for value in revised)
    tests = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return {relation for relation, holds in tests if holds}


def check_metadata(metadata: object) -> None:
    """Raise ValueError, naming what is wrong, for anything but a metadata record of this benchmark."""
    if not isinstance(metadata, dict):
        raise ValueError(f"expected one JSON object, got {type(metadata).__name__}")
    if metadata.get("tag") not in TAGS:
        raise ValueError(f"tag {metadata.get('tag')!r} is not one of {', '.join(TAGS)}")
    if not isinstance(metadata.get("prompt"), str):
        raise ValueError("'prompt' is missing")
    if not isinstance(metadata.get("include"), list) or not metadata["include"]:
        raise ValueError("'include' must be a list with at least one requirement")
    if not isinstance(metadata.get("exclude", []), list):
        raise ValueError("'exclude' must be a list")
    for number, part in enumerate(metadata["include"]):
        _check_part(part, number)
    for part in metadata.get("exclude", []):
        _check_part(part, 0)


def _check_part(part: object, number: int) -> None:
    if not isinstance(part, dict) or part.get("class") not in SHAPES:
        given = part.get("class") if isinstance(part, dict) else part
        raise ValueError(f"class {given!r} is no shape of the scenes: {', '.join(SHAPES)}")
    if not isinstance(part.get("count"), int) or isinstance(part["count"], bool) or part["count"] < 1:
        raise ValueError(f"count {part.get('count')!r} is not a whole number of at least 1")
    if "color" in part and part["color"] not in COLORS:
        guess = nearest(str(part["color"]), COLORS)
        raise ValueError(f"color {part['color']!r} is no colour of the scenes{guess}: {', '.join(COLORS)}")
    if "position" in part:
        position = part["position"]
        valid = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
        if not valid or position[1] not in range(number):
            raise ValueError(f"position {position!r} is not [relation, index of an earlier requirement]")


def load_pixels(path: Path) -> np.ndarray:
    """uint8 RGB pixels [height, width, 3] of an image file; DataError when damaged or smaller than 32 px."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); generate it again") from error
    if min(pixels.shape[:2]) < MIN_SIDE_PX:
        raise DataError(
            f"{path}: {pixels.shape[1]}x{pixels.shape[0]} px; the scorer needs at least {MIN_SIDE_PX} px"
        )
    return pixels


def read_folder(folder: Path) -> list[tuple[dict, list[Path]]]:
    """Metadata and sample files of each prompt of a GenEval folder, in order.

    Raises:
        ConfigError: no such folder.
        DataError: no prompt folders, metadata that cannot be used, or a prompt without samples.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: no such folder")
    prompts = sorted(
        (p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name)
    )
    if not prompts:
        raise DataError(
            f"{folder}: no prompt folders; expected <index>/metadata.jsonl and <index>/samples/0000.png"
        )
    out = []
    for prompt in prompts:
        metadata = _read_metadata(prompt / "metadata.jsonl")
        samples = prompt / "samples"
        files = sorted(samples.iterdir()) if samples.is_dir() else []
        files = [f for f in files if re.fullmatch(r"\d+\.png", f.name)]
        if not files:
            raise DataError(f"{samples}: no samples such as 0000.png; generate them again")
        out.append((metadata, files))
    return out


def _read_metadata(path: Path) -> dict:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        check_metadata(metadata)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; each prompt folder needs one") from None
    except ValueError as error:  # also damaged JSON and damaged UTF-8
        raise DataError(f"{path}: {error}") from error
    return metadata


def score_samples(folder: str | Path, progress: bool = False) -> list[SampleScore]:
    """Score every sample of a GenEval folder, in order (errors as `read_folder` and `load_pixels`)."""
    folder = Path(folder)
    work = [(metadata, file) for metadata, files in read_folder(folder) for file in files]
    return [
        SampleScore(str(file.relative_to(folder)), metadata, score_image(load_pixels(file), metadata))
        for metadata, file in tqdm(work, desc="score", unit="image", disable=None if progress else True)
    ]


def by_prompt(scores: Iterable[SampleScore]) -> list[tuple[dict, list[bool]]]:
    """Metadata of each prompt and the verdicts on its pictures, in the order of `score_samples`."""
    groups = itertools.groupby(scores, key=lambda score: Path(score.filename).parent)
    prompts = [list(group) for _, group in groups]
    return [(scores[0].metadata, [s.result.correct for s in scores]) for scores in prompts]


def score_folder(folder: str | Path) -> dict:
    """`summarise` of a GenEval folder."""
    return summarise(by_prompt(score_samples(folder)))


def summarise(prompts: Iterable[tuple[dict, Sequence[bool]]]) -> dict:
    """Accuracy per skill and their mean, from the metadata of every prompt and the verdicts on its pictures.

    Returns:
        ``mean`` over the skills that have pictures, the six skills (None without pictures), ``samples``
        (pictures that count for the mean), ``samples_per_skill``, ``standard_error`` of the mean and of every skill
        (`error_bars`), and ``held_out_pairs``: accuracies, ``samples`` and ``standard_error`` of the
        out-of-distribution split, which is no part of the mean.
    """
    verdicts: dict[str, list[Sequence[bool]]] = {skill: [] for skill in SKILL_OF_TAG.values()}
    held_out: dict[str, list[Sequence[bool]]] = {}
    for metadata, correct in prompts:
        skill = SKILL_OF_TAG[metadata["tag"]]
        if metadata.get("split") == HELD_OUT_SPLIT:
            held_out.setdefault(skill, []).append(correct)
        else:
            verdicts[skill].append(correct)
    shares = {skill: share(v) for skill, v in verdicts.items()}
    mean, error = mean_of(shares.values())
    per_skill = {skill: s.pictures if s else 0 for skill, s in shares.items()}
    held_out_shares = {skill: s for skill, v in held_out.items() if (s := share(v))}
    return {
        "mean": mean,
        **{skill: s.value if s else None for skill, s in shares.items()},
        "samples": sum(per_skill.values()),
        "samples_per_skill": per_skill,
        "standard_error": {"mean": error, **{skill: s.error if s else None for skill, s in shares.items()}},
        HELD_OUT_SPLIT: {
            **{skill: s.value for skill, s in held_out_shares.items()},
            "samples": sum(s.pictures for s in held_out_shares.values()),
            "standard_error": {skill: s.error for skill, s in held_out_shares.items()},
        },
    }


def summarise_seeds(seeds: Mapping[int, Sequence[tuple[dict, Sequence[bool]]]]) -> dict:
    """`summarise` of the prompts of all seeds together, and how the seeds differ.

    Args:
        seeds: what `summarise` takes, for each seed.

    Returns:
        as `summarise`, with ``seeds``, ``std_over_seeds`` of the mean and of every skill (None for one seed; a check
        of the standard error, not its source) and ``per_seed``: {"seed", "mean", the six skills, "samples"}.
    """
    results = {seed: summarise(prompts) for seed, prompts in seeds.items()}
    names = ("mean", *SKILL_OF_TAG.values())
    spreads = {name: spread(result[name] for result in results.values()) for name in names}
    return {
        **summarise(itertools.chain.from_iterable(seeds.values())),
        "seeds": list(seeds),
        "std_over_seeds": spreads if len(seeds) > 1 else None,
        "per_seed": [
            {"seed": seed, **{name: result[name] for name in (*names, "samples")}}
            for seed, result in results.items()
        ],
    }
