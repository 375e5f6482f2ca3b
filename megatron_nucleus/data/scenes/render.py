"""Scenes -> pixels, many at once: analytic edge coverage in a window around each object."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nucleus.data.scenes.world import COLORS, SHAPES, Scene

SQUARE_SIDE = 0.88  # of the box's half extent, so that the three shapes look equally large
TRIANGLE_TOP, TRIANGLE_BOTTOM = -1.0, 0.8  # apex and base in half extents; the base is 2 half extents wide
_MARGIN_PX = 2


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes of one size.

    Returns:
        uint8 RGB [N, height, width, 3]; picture i depends on scenes[i] alone.

    Raises:
        ValueError: no scene, or scenes of different sizes.
    """
    sizes = {(scene.height_px, scene.width_px) for scene in scenes}
    if len(sizes) != 1:
        raise ValueError(f"render needs scenes of one size, got {sorted(sizes)}")
    height, width = sizes.pop()
    count = len(scenes)
    canvas = np.empty((count, height, width, 3), np.float32)
    canvas[:] = np.array([s.background for s in scenes], np.float32)[:, None, None, None]
    for slot in range(max(len(scene.things) for scene in scenes)):  # one object per picture in each pass
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
        _paint(canvas, np.array(rows), [scenes[i].things[slot] for i in rows])
    return (canvas + 0.5).astype(np.uint8)


def _paint(canvas: np.ndarray, rows: np.ndarray, things: list) -> None:
    """Blend one object into each picture ``rows``."""
    _, height, width, _ = canvas.shape
    x = np.array([t.x_px for t in things], np.float32)
    y = np.array([t.y_px for t in things], np.float32)
    half = np.array([t.half_px for t in things], np.float32)
    shape = np.array([SHAPES.index(t.shape) for t in things])
    color = np.array([COLORS[t.color] for t in things], np.float32)
    side = int(np.ceil(2 * half.max())) + 2 * _MARGIN_PX
    side_x, side_y = min(side, width), min(side, height)
    left = np.clip(np.round(x - side_x / 2).astype(np.int64), 0, width - side_x)
    top = np.clip(np.round(y - side_y / 2).astype(np.int64), 0, height - side_y)
    columns = left[:, None] + np.arange(side_x)  # [M, side]
    lines = top[:, None] + np.arange(side_y)
    dx = (columns + np.float32(0.5) - x[:, None]).astype(np.float32)
    dy = (lines + np.float32(0.5) - y[:, None]).astype(np.float32)
    alpha = np.empty((len(things), side_y, side_x), np.float32)
    for number, name in enumerate(SHAPES):
        chosen = shape == number
        if chosen.any():
            alpha[chosen] = coverage(
                name, dx[chosen][:, None, :], dy[chosen][:, :, None], half[chosen][:, None, None]
            )
    flat = canvas.reshape(-1, 3)
    index = (rows[:, None, None] * height + lines[:, :, None]) * width + columns[:, None, :]
    under = flat[index]
    under += alpha[..., None] * (color[:, None, None, :] - under)
    flat[index] = under


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, from pixel centres relative to the shape's centre, in px.

    dx, dy and half broadcast against one another. A straight edge's coverage is 0.5 - signed distance, cut
    to [0, 1]. Against brute force at 32 px: 0.15 grey levels off on average, at most 53 in the pixel of a tip.
    """
    if shape == "circle":
        return np.clip(half + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
    if shape == "square":  # axis-aligned: the exact area is a product
        side = SQUARE_SIDE * half
        return np.clip(side + 0.5 - np.abs(dx), 0, 1) * np.clip(side + 0.5 - np.abs(dy), 0, 1)
    rise = TRIANGLE_BOTTOM - TRIANGLE_TOP
    normal = 1 / np.sqrt(rise * rise + 1)
    slanted = (np.abs(dx) * rise - (dy - TRIANGLE_TOP * half)) * normal
    base = dy - TRIANGLE_BOTTOM * half
    return np.clip(0.5 - slanted, 0, 1) * np.clip(0.5 - base, 0, 1)
