"""Procedural compositional scenes: a corpus and a benchmark that need no download.

`make_scene` draws scene i of a seed, `render` turns scenes into pixels, `captions` and `metadata` say what is
in them, `benchmark_prompts` asks for what training never showed.
"""

from megatron_nucleus.data.scenes.benchmark import HELD_OUT_SPLIT, benchmark_prompts, scene_for
from megatron_nucleus.data.scenes.captions import VOCABULARY, captions, metadata
from megatron_nucleus.data.scenes.draw import draw, render_all
from megatron_nucleus.data.scenes.export import export_scenes, side_data
from megatron_nucleus.data.scenes.render import render
from megatron_nucleus.data.scenes.world import (
    COLORS,
    HELD_OUT_COMPOSITIONS,
    HELD_OUT_PAIRS,
    RELATIONS,
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
    "RELATIONS",
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
    "export_scenes",
    "holds_held_out",
    "make_scene",
    "metadata",
    "render",
    "render_all",
    "scene_for",
    "side_data",
]
