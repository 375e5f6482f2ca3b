"""Procedural compositional scenes: a corpus and a benchmark that need no download.

`make_scene` draws scene i of a seed, `render` turns scenes into pixels, `captions` and `metadata` say what is
in them, `benchmark_prompts` asks for what training never showed.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_nucleus.data.scenes.benchmark import HELD_OUT_SPLIT, benchmark_prompts, scene_for
from megatron_nucleus.data.scenes.captions import VOCABULARY, captions, metadata
from megatron_nucleus.data.scenes.render import render
from megatron_nucleus.data.scenes.world import (
    COLORS,
    HELD_OUT_COMPOSITIONS,
    HELD_OUT_PAIRS,
    SHAPES,
    TAGS,
    Scene,
    SceneConfig,
    Thing,
    composition,
    holds_held_out,
    make_scene,
)

__all__ = [
    "COLORS",
    "HELD_OUT_COMPOSITIONS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_SPLIT",
    "SHAPES",
    "TAGS",
    "VOCABULARY",
    "Scene",
    "SceneConfig",
    "Thing",
    "benchmark_prompts",
    "captions",
    "composition",
    "draw",
    "holds_held_out",
    "make_scene",
    "metadata",
    "render",
    "render_all",
    "scene_for",
]

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
