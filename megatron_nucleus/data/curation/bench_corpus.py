"""A corpus to measure curation on: crops of a few photographs in many sizes, with every flaw that a filter looks for.

Everything follows from the seed: equal arguments give equal files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from megatron_nucleus.data.images import IMAGE_EXTENSIONS, UnusableImage, decode
from megatron_nucleus.utils.errors import ConfigError

BLOCK = 100  # images of one task
# Share of the images with each flaw; own choice, about what the published recipe reports for the whole of them.
FLAWS = {
    "exact_copy": 0.03,
    "recompressed_copy": 0.03,
    "blurred": 0.01,
    "blank": 0.01,
    "truncated": 0.01,
    "over_compressed": 0.01,
    "too_small": 0.01,
}
_SIZES_PX = (
    (512, 512),
    (640, 480),
    (480, 640),
    (768, 512),
    (512, 768),
    (896, 504),
    (1024, 1024),
    (1280, 960),
)


class _Task(NamedTuple):
    photographs: tuple[str, ...]
    folder: str
    first: int
    count: int
    seed: int


def find_photographs(folder: Path) -> list[Path]:
    """Pictures in a folder of which crops make sense: those that decode and have 300 px on the shortest side.

    Raises:
        ConfigError: none there.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix[1:].lower() not in IMAGE_EXTENSIONS or not path.is_file():
            continue
        try:
            image = decode(path.read_bytes()).image
        except UnusableImage:
            continue
        if min(image.size) >= 300 and np.asarray(image.convert("L").reduce(8), np.float32).std() > 10:
            found.append(path)
    if not found:
        raise ConfigError(f"--photos {folder}: no photographs of 300 px and more in it")
    return found


def write_corpus(photographs: list[Path], folder: Path, count: int, seed: int, workers: int) -> None:
    """Write ``count`` JPEGs with a ``.txt`` caption each; copies are of pictures a little earlier in the order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(map(str, photographs))
    tasks = [
        _Task(names, str(folder), first, min(BLOCK, count - first), seed) for first in range(0, count, BLOCK)
    ]
    with ProcessPoolExecutor(workers) as pool, tqdm(total=count, unit="img", desc="draw the corpus") as bar:
        for written in pool.map(_write_block, tasks):
            bar.update(written)


def _write_block(task: _Task) -> int:
    sources = [decode(Path(name).read_bytes()).image for name in task.photographs]
    payloads: list[bytes] = []
    for number in range(task.first, task.first + task.count):
        rng = np.random.default_rng([task.seed, number])
        flaw = _draw_flaw(rng)
        which = int(rng.integers(len(sources)))
        payload = _picture(sources[which], rng, flaw, payloads)
        payloads.append(payload)
        stem = os.path.join(task.folder, f"{number:08d}")
        Path(f"{stem}.jpg").write_bytes(payload)
        Path(f"{stem}.txt").write_text(
            f"a part of the photograph {Path(task.photographs[which]).stem}, number {number}\n"
        )
    return task.count


def _draw_flaw(rng: np.random.Generator) -> str | None:
    at = rng.random()
    for name, share in FLAWS.items():
        if at < share:
            return name
        at -= share
    return None


def _picture(source: Image.Image, rng: np.random.Generator, flaw: str | None, earlier: list[bytes]) -> bytes:
    if flaw in ("exact_copy", "recompressed_copy") and earlier:
        payload = earlier[int(rng.integers(len(earlier)))]
        if flaw == "exact_copy":
            return payload
        try:
            return _encode(decode(payload).image, 70)
        except UnusableImage:  # a copy of a truncated file is one
            return payload
    width, height = _SIZES_PX[int(rng.integers(len(_SIZES_PX)))]
    if flaw == "too_small":
        width, height = width // 4, height // 4
    image = _crop(source, rng, width, height)
    if flaw == "blank":
        level = int(rng.integers(20, 235))
        image = Image.new("RGB", image.size, (level, level, level))
    if flaw == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(min(image.size) / 40))
    payload = _encode(image, 5 if flaw == "over_compressed" else int(rng.integers(80, 96)))
    return payload[: len(payload) // 2] if flaw == "truncated" else payload


def _crop(source: Image.Image, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random part of the source in the wanted shape, perhaps mirrored, with other brightness and colour."""
    scale = min(source.width / width, source.height / height) * rng.uniform(0.35, 1.0)
    w, h = width * scale, height * scale
    left, top = rng.uniform(0, source.width - w), rng.uniform(0, source.height - h)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    gains = rng.uniform(0.8, 1.2, 3)
    tables: list[Callable[[int], float]] = [lambda v, g=gain: min(255, v * g) for gain in gains]
    bands = [band.point(table) for band, table in zip(image.split(), tables, strict=True)]
    return Image.merge("RGB", bands)


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
