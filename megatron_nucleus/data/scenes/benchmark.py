"""The embedded benchmark: prompts for the six skills in GenEval's schema, and scenes that make a prompt true.

two_object, position and color_attr ask only for held-out compositions: two objects that no training scene
shows together (`world`). single_object, counting and colors are atomic: three shapes, their counts, and the
(colour, shape) pairs of the training scenes. Held-out pairs have a split of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_nucleus.data.scenes.captions import metadata
from megatron_nucleus.data.scenes.world import (
    COLORS,
    HELD_OUT_COMPOSITIONS,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    TAGS,
    TRAIN_PAIRS,
    Lots,
    Pair,
    Scene,
    SceneConfig,
    place,
)
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.rng import key64

HELD_OUT_SPLIT = "held_out_pairs"
Kinds = tuple[tuple[Pair, int], ...]


def benchmark_prompts(n_per_skill: int, seed: int = 0, max_objects: int = 4) -> list[dict]:
    """``n_per_skill`` metadata records of each skill, then as many of each held-out-pair skill.

    The records of a skill run through a shuffled list of everything it can ask, again and again, so that no
    request comes twice before all came once. Records of the held-out pairs (tags colors and color_attr)
    carry ``"split": "held_out_pairs"`` and are no part of the mean score.

    Args:
        n_per_skill: records per skill, at least 1.
        seed: order of the requests.
        max_objects: largest count that counting asks for, 2 to 8.

    Raises:
        ConfigError: a number outside its range.
    """
    if n_per_skill < 1:
        raise ConfigError(f"--prompts-per-skill {n_per_skill}: at least 1 is needed")
    if not 2 <= max_objects <= 8:
        raise ConfigError(f"--max-objects {max_objects}: 2 to 8")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"--seed {seed}: must be a 64-bit number")
    records = [r for tag in TAGS for r in _records(tag, _requests(tag, max_objects), n_per_skill, seed)]
    for tag in ("colors", "color_attr"):
        held = _records(tag, _held_out_requests(tag), n_per_skill, seed)
        records += [record | {"split": HELD_OUT_SPLIT} for record in held]
    return records


def _records(tag: str, requests: Sequence[tuple[Kinds, str | None]], count: int, seed: int) -> list[dict]:
    records: list[dict] = []
    turn = 0
    while len(records) < count:
        lots = Lots(key64(seed, turn, f"scene benchmark {tag} {len(requests)}"))
        records += [_record(tag, kinds, relation) for kinds, relation in lots.shuffled(requests)]
        turn += 1
    return records[:count]


def _record(tag: str, kinds: Kinds, relation: str | None) -> dict:
    # the words of a scene do not depend on where its objects stand: any layout gives the same record
    tier = "grid" if sum(count for _, count in kinds) <= 4 else "free"
    config = SceneConfig(tier=tier, scene_sizes=("64x64",))
    return metadata(place(config, Lots(0), 0, tag, kinds, relation))


def _requests(tag: str, max_objects: int) -> list[tuple[Kinds, str | None]]:
    """Everything that a skill's prompts may ask for."""
    if tag in ("single_object", "counting"):
        some = {
            shape: pair for pair in reversed(TRAIN_PAIRS) for shape in (pair[1],)
        }  # the prompt hides the colour
        counts = (1,) if tag == "single_object" else range(2, max_objects + 1)
        return [(((some[shape], count),), None) for shape in SHAPES for count in counts]
    if tag == "colors":
        return [(((pair, 1),), None) for pair in TRAIN_PAIRS]
    asked = sorted(c for c in HELD_OUT_COMPOSITIONS if tag != "color_attr" or c[0][0] != c[1][0])
    orders = [kinds for a, b in asked for kinds in (((a, 1), (b, 1)), ((b, 1), (a, 1)))]
    relations = RELATIONS if tag == "position" else (None,)
    return [(kinds, relation) for kinds in orders for relation in relations]


def _held_out_requests(tag: str) -> list[tuple[Kinds, str | None]]:
    """Requests that name a held-out pair, alone or beside a trained pair of another shape."""
    held = sorted(HELD_OUT_PAIRS)
    if tag == "colors":
        return [(((pair, 1),), None) for pair in held]
    beside = [(a, b) for a in held for b in TRAIN_PAIRS if a[1] != b[1] and a[0] != b[0]]
    return [(kinds, None) for a, b in beside for kinds in (((a, 1), (b, 1)), ((b, 1), (a, 1)))]


def scene_for(record: dict, config: SceneConfig, seed: int, index: int) -> Scene:
    """Draw a scene of which the metadata record ``record`` is true (unnamed colours by lot).

    Colours that the prompt names are drawn even where ``include`` does not judge them.

    Raises:
        ConfigError: the record asks for more objects than ``config.max_objects`` allows.
    """
    lots = Lots(key64(seed, index, "scene for prompt"))
    kinds: list[tuple[Pair, int]] = []
    relation = None
    for part in record["include"]:
        color = part.get("color") or _named_color(record["prompt"], part["class"]) or lots.pick(tuple(COLORS))
        kinds.append(((color, part["class"]), part["count"]))
        if "position" in part:
            relation = part["position"][0]
    total = sum(count for _, count in kinds)
    if total > config.max_objects:
        raise ConfigError(
            f"--max-objects {config.max_objects}: the prompt '{record['prompt']}' asks for {total}"
        )
    if relation is not None:  # include lists what the relation refers to first, a scene lists it second
        kinds.reverse()
    return place(config, lots, index, record["tag"], kinds, relation)


def _named_color(prompt: str, shape: str) -> str | None:
    words = prompt.split()
    for before, word in itertools.pairwise(words):
        if word in (shape, shape + "s") and before in COLORS:
            return before
    return None
