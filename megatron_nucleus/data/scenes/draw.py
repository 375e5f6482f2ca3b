"""Scene ids -> scenes and pixels, many at a time and of any mix of sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_nucleus.data.scenes.render import render
from megatron_nucleus.data.scenes.world import Scene, SceneConfig, make_scene

_CHUNK = 64  # pictures drawn at once


def draw(config: SceneConfig, seed: int, indices: Sequence[int]) -> Iterator[tuple[Scene, np.ndarray]]:
    """Yield (scene, uint8 RGB pixels [height, width, 3]) for each index, in order, drawn many at a time."""
    for start in range(0, len(indices), _CHUNK):
        scenes = [make_scene(config, seed, index) for index in indices[start : start + _CHUNK]]
        yield from zip(scenes, render_all(scenes), strict=True)


def render_all(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """`render` for scenes of any sizes: one picture [height, width, 3] per scene, in order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for position, scene in enumerate(scenes):
        by_size.setdefault((scene.height_px, scene.width_px), []).append(position)
    pictures: list[np.ndarray] = [np.empty(0)] * len(scenes)
    for positions in by_size.values():
        for position, picture in zip(positions, render([scenes[p] for p in positions]), strict=True):
            pictures[position] = picture
    return pictures
