"""What a scene may hold: shapes, colours, the held-out part of the world, and how a scene is drawn by lot.

**Held-out things**, fixed for every seed, so that a score on them means generalisation:

* *Held-out pairs* (`HELD_OUT_PAIRS`): one (colour, shape) pair per shape that no training scene ever shows.
* *Held-out compositions* (`HELD_OUT_COMPOSITIONS`): a composition is an unordered set of two different
  (colour, shape) pairs with different shapes (the kinds of object in one scene always differ in shape). A
  fifth of them is never shown together in one training scene, whatever the other objects of that scene and
  whatever their relation: a held-out composition is new in every position too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from megatron_nucleus.data.scenes.layout import lay_out
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.rng import key64

SHAPES = ("circle", "square", "triangle")
COLORS: dict[
    str, tuple[int, int, int]
] = {  # RGB, saturated: at least 100 apart from one another and from the greys
    "red": (226, 36, 36),
    "green": (28, 164, 60),
    "blue": (36, 72, 232),
    "yellow": (250, 222, 36),
    "purple": (168, 44, 204),
    "white": (252, 252, 252),
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's spelling
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND_RANGE = (64, 160)  # grey levels, both ends included
MIN_SIDE_PX, MAX_SIDE_PX = 32, 1024
MAX_OBJECTS = 8
MIN_AREA_PER_OBJECT_PX = 150  # free tier: below about 12 x 12 px a circle and a square look alike

Pair = tuple[str, str]  # (colour, shape)

HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    {("yellow", "circle"), ("green", "square"), ("purple", "triangle")}
)
TRAIN_PAIRS: tuple[Pair, ...] = tuple(
    pair for pair in itertools.product(COLORS, SHAPES) if pair not in HELD_OUT_PAIRS
)
_HELD_OUT_FRACTION = 0.2


def composition(a: Pair, b: Pair) -> tuple[Pair, Pair]:
    """The unordered composition of two pairs in its canonical order."""
    return (a, b) if a <= b else (b, a)


def _split_compositions() -> tuple[tuple[tuple[Pair, Pair], ...], frozenset[tuple[Pair, Pair]]]:
    """Hold out a fifth of the compositions of every pair of shapes, chosen by hash."""
    strata: dict[tuple[str, str], list[tuple[Pair, Pair]]] = {}
    for a, b in itertools.combinations(sorted(TRAIN_PAIRS), 2):
        shapes = tuple(sorted({a[1], b[1]}))
        if len(shapes) == 2:
            strata.setdefault(shapes, []).append(composition(a, b))
    held: set[tuple[Pair, Pair]] = set()
    for members in strata.values():
        ranked = sorted(members, key=lambda c: key64(0, 0, f"scene composition {c}"))
        held.update(ranked[: round(_HELD_OUT_FRACTION * len(ranked))])
    train = tuple(c for members in strata.values() for c in members if c not in held)
    return train, frozenset(held)


TRAIN_COMPOSITIONS, HELD_OUT_COMPOSITIONS = _split_compositions()
_TWO_COLORS = tuple(c for c in TRAIN_COMPOSITIONS if c[0][0] != c[1][0])  # what attribution can be told by


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Procedural scenes: how large, how many objects, how hard."""

    tier: str = knob(
        "grid", "grid: 2 x 2 cells with small jitter; free: any place and size", choices=("grid", "free")
    )
    scene_sizes: tuple[str, ...] = knob(
        ("32x32",), "picture sizes WIDTHxHEIGHT, drawn with equal chance", unit="px"
    )
    max_objects: int = knob(4, "most objects in one scene (grid: at most 4)", unit="objects")
    skill_weights: tuple[float, ...] = knob(
        (0.14, 0.12, 0.24, 0.10, 0.22, 0.18), f"share of scenes per skill: {', '.join(TAGS)}"
    )
    mixed_counting: float = knob(
        0.15, "share of counting scenes that hold two or three kinds of object", unit="frac"
    )

    def __post_init__(self):
        if not self.scene_sizes:
            raise ConfigError("--scene-sizes: at least one WIDTHxHEIGHT is needed")
        most = 4 if self.tier == "grid" else MAX_OBJECTS
        if not 2 <= self.max_objects <= most:
            raise ConfigError(f"--max-objects {self.max_objects}: 2 to {most} for tier {self.tier}")
        for (width, height), text in zip(self.sizes_px, self.scene_sizes, strict=True):
            room = width * height // MIN_AREA_PER_OBJECT_PX
            if self.tier == "free" and room < self.max_objects:
                raise ConfigError(
                    f"--max-objects {self.max_objects}: {text} px has room for {room} in the free tier"
                )
        weights = self.skill_weights
        if len(weights) != len(TAGS) or not all(0 <= w < float("inf") for w in weights) or sum(weights) <= 0:
            raise ConfigError(
                f"--skill-weights {' '.join(map(str, weights))}: expected {len(TAGS)} numbers >= 0 "
                f"that are not all 0, for {', '.join(TAGS)}"
            )
        if not 0 <= self.mixed_counting <= 1:
            raise ConfigError(f"--mixed-counting {self.mixed_counting}: expected 0 to 1")

    @property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every allowed picture size."""
        return tuple(_parse_size(text) for text in self.scene_sizes)


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise ConfigError(f"--scene-sizes {text}: expected WIDTHxHEIGHT such as 48x80")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < MIN_SIDE_PX or max(width, height) > MAX_SIDE_PX:
        raise ConfigError(f"--scene-sizes {text}: both sides must be {MIN_SIDE_PX} to {MAX_SIDE_PX} px")
    return width, height


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: centre and half extent in px (x to the right, y down, pixel i covers [i, i + 1])."""

    shape: str
    color: str
    x_px: float
    y_px: float
    half_px: float

    @property
    def pair(self) -> Pair:
        return (self.color, self.shape)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything in a picture. Objects of one kind are adjacent; ``relation`` is of things 0 to 1."""

    index: int
    tag: str
    width_px: int
    height_px: int
    background: int
    things: tuple[Thing, ...]
    relation: str | None = None
    wording: int = 0  # 63-bit key of the random choices in its captions

    def groups(self) -> list[tuple[str, str, list[Thing]]]:
        """Objects by kind, in order: [(colour, shape, things)]."""
        return [
            (color, shape, list(members))
            for (color, shape), members in itertools.groupby(self.things, key=lambda t: t.pair)
        ]


def holds_held_out(scene: Scene) -> bool:
    """True when the scene shows a held-out pair, or two objects that form a held-out composition."""
    pairs = sorted({thing.pair for thing in scene.things})
    if any(pair in HELD_OUT_PAIRS for pair in pairs):
        return True
    return any(composition(a, b) in HELD_OUT_COMPOSITIONS for a, b in itertools.combinations(pairs, 2))


class Lots:
    """A stream of uniform numbers from one key (Philox, drawn in blocks because single draws are slow)."""

    def __init__(self, key: int):
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._block: list[float] = []
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        if self._next == len(self._block):
            self._block, self._next = self._generator.random(48).tolist(), 0
        self._next += 1
        return low + (high - low) * self._block[self._next - 1]

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self.uniform() * count)

    def pick(self, items: Sequence):
        """One item, all equally likely."""
        return items[self.below(len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """A position with probability proportional to its weight."""
        mark = self.uniform() * sum(weights)
        last = 0
        for position, weight in enumerate(weights):
            if weight > 0:
                last = position
                mark -= weight
                if mark < 0:
                    return position
        return last

    def shuffled(self, items: Sequence) -> list:
        """A random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


def make_scene(config: SceneConfig, seed: int, index: int) -> Scene:
    """Training scene ``index`` of ``seed``: depends on nothing else, and holds nothing that is held out."""
    lots = Lots(key64(seed, index, "scene"))
    tag = TAGS[lots.weighted(config.skill_weights)]
    return place(config, lots, index, tag, _draw_kinds(config, tag, lots))


def place(
    config: SceneConfig,
    lots: Lots,
    index: int,
    tag: str,
    kinds: Sequence[tuple[Pair, int]],
    relation: str | None = None,
) -> Scene:
    """Lay out ``kinds`` ((pair, count) each); a position scene without a given relation draws one."""
    width, height = lots.pick(config.sizes_px)
    background = BACKGROUND_RANGE[0] + lots.below(BACKGROUND_RANGE[1] - BACKGROUND_RANGE[0] + 1)
    if tag == "position" and relation is None:
        relation = lots.pick(RELATIONS)
    pairs = [pair for pair, count in kinds for _ in range(count)]
    spots = lay_out(config.tier, lots, width, height, len(pairs), relation)
    things = tuple(
        Thing(shape, color, x, y, half) for (color, shape), (x, y, half) in zip(pairs, spots, strict=True)
    )
    wording = int(lots.uniform() * (1 << 53))
    return Scene(index, tag, width, height, background, things, relation, wording)


def _draw_kinds(config: SceneConfig, tag: str, lots: Lots) -> list[tuple[Pair, int]]:
    if tag in ("single_object", "colors"):
        return [(lots.pick(TRAIN_PAIRS), 1)]
    if tag != "counting":
        pairs = lots.shuffled(lots.pick(_TWO_COLORS if tag == "color_attr" else TRAIN_COMPOSITIONS))
        return [(pair, 1) for pair in pairs]
    if config.max_objects < 3 or lots.uniform() >= config.mixed_counting:
        return [(lots.pick(TRAIN_PAIRS), 2 + lots.below(config.max_objects - 1))]
    return _draw_mixed(config.max_objects, lots)


def _draw_mixed(max_objects: int, lots: Lots) -> list[tuple[Pair, int]]:
    """Two or three kinds of different shapes, three objects or more in total."""
    total = 3 + lots.below(max_objects - 2)
    pairs = lots.shuffled(lots.pick(TRAIN_COMPOSITIONS))
    third = next(shape for shape in SHAPES if shape not in (pairs[0][1], pairs[1][1]))
    fitting = [
        pair
        for pair in TRAIN_PAIRS
        if pair[1] == third and not any(composition(pair, p) in HELD_OUT_COMPOSITIONS for p in pairs)
    ]
    if fitting and lots.uniform() < 0.5:
        pairs.append(lots.pick(fitting))
    counts = [1] * len(pairs)
    for _ in range(total - len(pairs)):
        counts[lots.below(len(counts))] += 1
    return list(zip(pairs, counts, strict=True))
