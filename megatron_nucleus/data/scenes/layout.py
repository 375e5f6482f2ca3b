"""Where the objects of a scene stand: 2 x 2 cells with small jitter, or free places without overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_nucleus.data.scenes.world import Lots

Spot = tuple[float, float, float]  # x, y, half extent in px

_GRID_HALF = (0.31, 0.39)  # half extent as a share of the cell's short side: 10 to 12.5 px across at 32 px
_GRID_JITTER = 1 / 16  # of the cell's short side: 1 px at 32 px
_FREE_MIN_HALF_PX = 4.5
_FREE_TRIES = 40
_ACROSS = 0.6  # most that related centres differ along the other axis, as a share of the relation's own


def lay_out(tier: str, lots: Lots, width: int, height: int, count: int, relation: str | None) -> list[Spot]:
    """``count`` spots inside width x height px that do not touch; spot 0 stands in ``relation`` to spot 1."""
    if tier == "grid":
        return _grid(lots, width, height, count, relation)
    half_max = min(0.27 * min(width, height), 0.38 * math.sqrt(width * height / max(count, 2)))
    half_min = max(_FREE_MIN_HALF_PX, 0.42 * half_max)
    for shrink in (1.0, 0.8, 0.65):
        top = max(half_min, half_max * shrink)
        spots = _free(lots, width, height, count, relation, (half_min, top))
        if spots is not None:
            return spots
    return _cells(lots, width, height, count, relation)


def _grid(lots: Lots, width: int, height: int, count: int, relation: str | None) -> list[Spot]:
    # a relation is shown in one row or one column, so that "left of" never means a diagonal
    order = lots.shuffled(range(4)) if relation is None else _related_cells(lots, relation)
    short = min(width, height) / 2
    spots = []
    for cell in order[:count]:
        x = (cell % 2 + 0.5) * width / 2 + lots.uniform(-1, 1) * _GRID_JITTER * short
        y = (cell // 2 + 0.5) * height / 2 + lots.uniform(-1, 1) * _GRID_JITTER * short
        spots.append((x, y, lots.uniform(*_GRID_HALF) * short))
    return spots


def _related_cells(lots: Lots, relation: str) -> list[int]:
    """Two cells of the 2 x 2 grid (row-major) in which the first stands in ``relation`` to the second."""
    line = lots.below(2)
    first, second = (2 * line, 2 * line + 1) if relation in ("left of", "right of") else (line, line + 2)
    return [first, second] if relation in ("left of", "above") else [second, first]


def _free(
    lots: Lots, width: int, height: int, count: int, relation: str | None, halves: tuple[float, float]
) -> list[Spot] | None:
    """Rejection sampling; None when it did not find room (the caller shrinks the objects)."""
    gap = max(2.0, 0.04 * min(width, height))
    spots: list[Spot] = []
    for _ in range(_FREE_TRIES):
        half = lots.uniform(*halves)
        margin = half + 1.0
        spot = (lots.uniform(margin, width - margin), lots.uniform(margin, height - margin), half)
        clear = all(max(abs(spot[0] - s[0]), abs(spot[1] - s[1])) >= half + s[2] + gap for s in spots)
        if clear and (relation is None or len(spots) != 1 or _stands(spots[0], spot, relation)):
            spots.append(spot)
            if len(spots) == count:
                return spots
    return None


def _stands(a: Spot, b: Spot, relation: str) -> bool:
    """Whether a is clearly in ``relation`` to b: they differ little along the other axis."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return along * sign > 0 and abs(across) <= _ACROSS * abs(along)


def _cells(lots: Lots, width: int, height: int, count: int, relation: str | None) -> list[Spot]:
    """The layout that always fits: one object per cell of the squarest grid that holds ``count``."""
    if relation is not None:
        columns, rows = (2, 1) if relation in ("left of", "right of") else (1, 2)
        order: Sequence[int] = (0, 1) if relation in ("left of", "above") else (1, 0)
    else:
        columns = max(range(1, count + 1), key=lambda c: min(width / c, height / math.ceil(count / c)))
        rows = math.ceil(count / columns)
        order = lots.shuffled(range(columns * rows))
    half = min(0.38 * min(width / columns, height / rows), 0.27 * min(width, height))
    slack_x, slack_y = max(width / columns / 2 - half - 1, 0.0), max(height / rows / 2 - half - 1, 0.0)
    if relation is not None:  # the centres are at least 2 half + 2 apart along the relation
        across = 0.5 * _ACROSS * (2 * half + 2)
        slack_x, slack_y = (
            (slack_x, min(slack_y, across)) if columns == 2 else (min(slack_x, across), slack_y)
        )
    spots = []
    for cell in order[:count]:
        x = (cell % columns + 0.5) * width / columns + lots.uniform(-1, 1) * slack_x
        y = (cell // columns + 0.5) * height / rows + lots.uniform(-1, 1) * slack_y
        spots.append((x, y, half))
    return spots
