"""Scenes -> files: WebDataset tars as img2dataset writes them, or a plain folder of images and captions."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.data.scenes.captions import captions, metadata
from megatron_nucleus.data.scenes.draw import draw
from megatron_nucleus.data.scenes.world import Scene, SceneConfig
from megatron_nucleus.data.shards import ShardFile, encode_json
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.staging import staged_folder

FORMATS = ("webdataset", "folder")
LICENCE = "CC0-1.0"
_CHUNK = 256  # scenes drawn at once
_PNG_LEVEL = 1  # fast; scenes are flat and compress well anyway

# The order in which the skills stand for episode buckets B1 to B6: our own choice, by how late they are learned.
_SKILL_ORDER = ("single_object", "colors", "two_object", "counting", "color_attr", "position")

Add = Callable[[str, bytes, dict], None]  # (key, PNG, side data)


def export_scenes(
    config: SceneConfig,
    output: str | Path,
    *,
    count: int,
    seed: int = 0,
    file_format: str = "webdataset",
    samples_per_shard: int = 10_000,
    progress: bool = False,
) -> int:
    """Write scenes 0 to ``count - 1`` of ``seed`` into a new folder, which appears when it is complete.

    webdataset: ``00000.tar`` ..., each sample ``<key>.png``, ``<key>.txt`` (medium caption), ``<key>.json``.
    folder: ``<key>.png`` and ``<key>.json``. The JSON (`side_data`) is the same in both.

    Returns:
        Bytes written.

    Raises:
        ConfigError: a count or shard size below 1, an unknown format, or an output folder that is not empty or
            cannot be written.
        DataError: the disk is full.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: at least 1 is needed")
    if samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard {samples_per_shard}: at least 1 is needed")
    if file_format not in FORMATS:
        raise ConfigError(f"--format {file_format}: one of {', '.join(FORMATS)}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"--seed {seed}: must be a 64-bit number")
    write = _write_webdataset if file_format == "webdataset" else _write_folder
    samples = _samples(config, seed, count)
    with staged_folder(Path(output)) as folder:
        with tqdm(samples, "scenes", count, unit="image", disable=None if progress else True) as bar:
            write(folder, bar, samples_per_shard)
        return sum(file.stat().st_size for file in folder.iterdir())


def side_data(scene: Scene) -> dict:
    """What is known about a picture besides its pixels, as JSON.

    ``captions`` holds all three with their provenance, ``metadata`` is GenEval's record.
    """
    return {
        "captions": [dict(vars(caption)) for caption in captions(scene)],
        "licence": LICENCE,
        "width": scene.width_px,
        "height": scene.height_px,
        **curriculum_place(scene),
        "scene": vars(scene) | {"things": [dict(vars(thing)) for thing in scene.things]},
        "metadata": metadata(scene),
    }


def curriculum_place(scene: Scene) -> dict[str, str]:
    """Stand-ins for the scores of photographs, so that a curriculum can be run on scenes.

    ``tier``: A1 to A5 by the number of objects (five and more: A5). ``episode_bucket``: B1 to B6 by skill, the
    later a skill is learned the later its bucket.
    """
    return {
        "tier": TIERS[min(len(scene.things), len(TIERS)) - 1],
        "episode_bucket": EPISODE_BUCKETS[_SKILL_ORDER.index(scene.tag)],
    }


def _medium(side: dict) -> str:
    return next(c["text"] for c in side["captions"] if c["length_class"] == "medium")


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 RGB pixels [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _samples(config: SceneConfig, seed: int, count: int) -> Iterator[tuple[str, bytes, dict]]:
    for start in range(0, count, _CHUNK):
        for scene, pixels in draw(config, seed, range(start, min(start + _CHUNK, count))):
            yield f"{scene.index:09d}", encode_png(pixels), side_data(scene)


def _write_webdataset(
    folder: Path, samples: Iterator[tuple[str, bytes, dict]], samples_per_shard: int
) -> None:
    shard: ShardFile | None = None
    try:
        for number, (key, png, side) in enumerate(samples):
            if number % samples_per_shard == 0:
                if shard is not None:
                    shard.close()
                shard = ShardFile(folder, f"{number // samples_per_shard:05d}.tar", "scenes")
            members = {"png": png, "json": encode_json(side | {"key": key}), "txt": _medium(side).encode()}
            shard.add(key, members)
    except BaseException:
        if shard is not None:
            shard.abort()
        raise
    shard.close()


def _write_folder(folder: Path, samples: Iterator[tuple[str, bytes, dict]], samples_per_shard: int) -> None:
    for key, png, side in samples:
        (folder / f"{key}.png").write_bytes(png)
        (folder / f"{key}.json").write_text(json.dumps(side | {"key": key}, indent=1), encoding="utf-8")
