"""What is said about a scene: three true captions, and the GenEval metadata of the same scene.

short     the skill's own GenEval sentence, with no more than it says ("a photo of three circles")
medium    every object with its colour ("a photo of a red circle left of a blue square")
detailed  colours, places and the background

The vocabulary is about 40 words (`VOCABULARY`). The benchmark's prompts are made by the same functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_nucleus.data.scenes.world import COLORS, INVERSE, SHAPES, Lots, Scene, Thing
from megatron_nucleus.types import Caption

GRAMMAR = "scenes-1"  # raise the number when the sentences change
GRAMMAR_HASH = hashlib.sha256(GRAMMAR.encode()).hexdigest()[:16]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
OPENINGS = ("a photo of ", "a picture of ", "")
_OPENING_WEIGHTS = (0.7, 0.15, 0.15)
_DARK_BELOW, _LIGHT_FROM = 96, 128  # grey levels
_MIDDLE = 0.1  # a centre nearer than this share of the side to the middle is in the middle
_MOST_PLACES = 4  # more places than this make a sentence nobody would write

_PLAIN_WORDS = "a photo picture of and the to on at in left right above below top bottom middle"
_TONE_WORDS = "dark light grey background"
VOCABULARY = frozenset(
    [*_PLAIN_WORDS.split(), *_TONE_WORDS.split(), *SHAPES, *(f"{s}s" for s in SHAPES), *COLORS, *NUMBERS[2:]]
)


def captions(scene: Scene) -> tuple[Caption, ...]:
    """The short, the medium and the detailed caption; each is true of the picture."""
    lots = Lots(scene.wording)
    texts = {"short": _short(scene, lots), "medium": _medium(scene, lots), "detailed": _detailed(scene, lots)}
    if (
        texts["medium"] == texts["short"]
    ):  # curation keeps equal captions once, and all three lengths are wanted
        old = next(opening for opening in OPENINGS if texts["medium"].startswith(opening))
        new = lots.pick([opening for opening in OPENINGS if opening != old])
        texts["medium"] = new + texts["medium"].removeprefix(old)
    return tuple(
        Caption(text=text, length_class=length, source="scenes", prompt_hash=GRAMMAR_HASH)
        for length, text in texts.items()
    )


def metadata(scene: Scene) -> dict:
    """GenEval's record of the scene: tag, include, exclude (counting only) and prompt.

    ``prompt`` is the sentence without variation. Colours are part of ``include`` for colors and color_attr
    alone, as in GenEval: each skill judges its own aspect.
    """
    colored = scene.tag in ("colors", "color_attr")
    include: list[dict] = []
    exclude: list[dict] = []
    for color, shape, members in scene.groups():
        include.append({"class": shape, "count": len(members)} | ({"color": color} if colored else {}))
        if scene.tag == "counting":
            exclude.append({"class": shape, "count": len(members) + 1})
    if scene.relation is not None:  # GenEval's order: what the relation refers to comes first
        include = [include[1], include[0] | {"position": [scene.relation, 0]}]
    record = {"tag": scene.tag, "include": include}
    return record | ({"exclude": exclude} if exclude else {}) | {"prompt": prompt(scene)}


def prompt(scene: Scene) -> str:
    """The benchmark's sentence. Only single_object and counting leave the colours out."""
    return OPENINGS[0] + _plain(scene, colored=scene.tag not in ("single_object", "counting"))


def phrase(shape: str, color: str | None, count: int) -> str:
    """ "a red circle", "three squares"."""
    words = ["a" if count == 1 else NUMBERS[count]] + ([color] if color else [])
    return " ".join([*words, shape + ("s" if count > 1 else "")])


def _plain(scene: Scene, colored: bool) -> str:
    parts = [phrase(shape, color if colored else None, len(m)) for color, shape, m in scene.groups()]
    return f" {scene.relation} ".join(parts) if scene.relation else _join(parts)


def _join(parts: Sequence[str]) -> str:
    return " and ".join(parts)


def _opening(lots: Lots) -> str:
    return OPENINGS[lots.weighted(_OPENING_WEIGHTS)]


def _related(scene: Scene, lots: Lots, colored: bool) -> str:
    """A relation said from either side, in either wording."""
    names = [phrase(t.shape, t.color if colored else None, 1) for t in scene.things]
    relation = scene.relation
    if lots.uniform() < 0.5:
        names.reverse()
        relation = INVERSE[relation]
    if relation in ("left of", "right of") and lots.uniform() < 0.2:
        relation = "to the " + relation
    return f"{names[0]} {relation} {names[1]}"


def _mention(scene: Scene, lots: Lots, colored: bool) -> str:
    if scene.relation is not None:
        return _related(scene, lots, colored)
    groups = lots.shuffled(scene.groups())
    return _join([phrase(shape, color if colored else None, len(m)) for color, shape, m in groups])


def _short(scene: Scene, lots: Lots) -> str:
    return _opening(lots) + _mention(scene, lots, colored=scene.tag in ("colors", "color_attr"))


def _medium(scene: Scene, lots: Lots) -> str:
    return _opening(lots) + _mention(scene, lots, colored=True)


def _detailed(scene: Scene, lots: Lots) -> str:
    tone = "dark " if scene.background < _DARK_BELOW else "light " if scene.background >= _LIGHT_FROM else ""
    if len(scene.things) > _MOST_PLACES or (scene.relation is not None and lots.uniform() < 0.5):
        body = _mention(scene, lots, colored=True)
    else:
        body = _join([_placed(scene, *group) for group in lots.shuffled(scene.groups())])
    return f"{_opening(lots)}{body} on a {tone}grey background"


def _placed(scene: Scene, color: str, shape: str, members: list[Thing]) -> str:
    places = [_place(scene, thing) for thing in members]
    counted = [p if places.count(p) == 1 else "" for p in places]
    if "" in counted:  # two objects of a kind in one quarter (free tier): places would not tell them apart
        return phrase(shape, color, len(members))
    return f"{phrase(shape, color, len(members))} {_join(places)}"


def _place(scene: Scene, thing: Thing) -> str:
    x, y = thing.x_px / scene.width_px - 0.5, thing.y_px / scene.height_px - 0.5
    row = "top" if y < -_MIDDLE else "bottom" if y > _MIDDLE else ""
    column = "left" if x < -_MIDDLE else "right" if x > _MIDDLE else ""
    words = " ".join(w for w in (row, column) if w)
    return f"at the {words}" if words else "in the middle"
