"""How fast images come out of decoders and loaders, and how long a consumer waits for them (tools/bench_data.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_nucleus.data import decoders, images
from megatron_nucleus.data.dataset import Corpus, open_corpus
from megatron_nucleus.data.loader import DataConfig, Loader, build_loader
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json

BUCKET = "1024x1024"
QUALITY = 90  # of the JPEGs, with 4:2:0 colours: own choice
TILE_PX = 192  # of a mosaic; own choice, smaller than every photograph
ROUNDS = 5  # turns that the decoders take on the same images
WARM_UP_BATCHES = 3  # taken before the clock starts, beside those that lie ready
SEED = 0


def make_corpus(folder: Path, photographs: Sequence[Path], size_px: tuple[int, int], count: int) -> Corpus:
    """A data set of ``count`` JPEGs of ``size_px`` (width, height); a finished one of equal settings is used again.

    Every image is a mosaic of pieces of photographs as they are, not enlarged, so that it has as many details per
    pixel as they have. Equal arguments give equal files.

    Raises:
        ConfigError: the folder holds something else.
    """
    settings = {"size_px": list(size_px), "count": count, "photographs": [path.name for path in photographs]}
    writer = DatasetWriter(folder, tool="bench_data", settings=settings)
    if not writer.complete:
        sources = [np.asarray(images.decode(path.read_bytes()).image) for path in photographs]
        for number in range(count):
            payload = _mosaic(sources, size_px, np.random.default_rng([*size_px, number]))
            row = {"id": hashlib.sha256(payload).hexdigest(), "aspect_bucket": BUCKET}
            row |= {"width_px": size_px[0], "height_px": size_px[1]}
            captions = [{"text": f"mosaic {number}", "length_class": "short", "source": "bench"}]
            writer.add(row, {"jpg": payload, "json": encode_json({"captions": captions})})
        writer.finish({})
    return open_corpus(folder)


def _mosaic(sources: Sequence[np.ndarray], size_px: tuple[int, int], rng: np.random.Generator) -> bytes:
    width, height = size_px
    rows, columns = -(-height // TILE_PX), -(-width // TILE_PX)
    canvas = np.empty((rows * TILE_PX, columns * TILE_PX, 3), np.uint8)
    for top in range(0, canvas.shape[0], TILE_PX):
        for left in range(0, canvas.shape[1], TILE_PX):
            source = sources[rng.integers(len(sources))]
            y, x = (int(rng.integers(side - TILE_PX + 1)) for side in source.shape[:2])
            tile = source[y : y + TILE_PX, x : x + TILE_PX]
            canvas[top : top + TILE_PX, left : left + TILE_PX] = tile[:, :: rng.choice((-1, 1))]
    buffer = io.BytesIO()
    Image.fromarray(canvas[:height, :width]).save(buffer, "JPEG", quality=QUALITY, subsampling=2)
    return buffer.getvalue()


def time_decoders(corpus: Corpus, names: Sequence[str], side_px: int, batch: int) -> list[dict]:
    """Decode every image of a corpus and fit it into a square, in this process, on files in memory.

    The decoders take turns, so that a machine that is busy with other things slows all of them; the figure is the
    median over the turns. A library's time includes what it is given the images by: header and sha256.

    Args:
        names: of `decoders.DECODERS`, Pillow among them, all able to run here. side_px: of the square. batch: images
            given at once.

    Returns:
        by decoder: ``decoder``, ``images_per_s``, ``low`` and ``high`` over the turns, ``library_frac`` of the images
        that the library decoded, and beside Pillow's pixels of the first batch: ``mean_difference`` in levels of 255,
        ``over_1_frac`` of the values that differ by more than one level.
    """
    samples = [corpus.read(row) for row in range(len(corpus))]
    opened = {name: decoders.open_decoder(name, corpus) for name in names}
    ways: dict[str, Callable[[Sequence], list[np.ndarray]]] = {}
    for name, decoder in opened.items():
        if decoder is None:
            ways[name] = lambda part: [images.load_pixels(s.payload, side_px, side_px) for s in part]
        else:
            ways[name] = lambda part, to=decoder: to.decode(
                [s.payload for s in part], [s.id for s in part], side_px, side_px
            )
    parts = [samples[at : at + batch] for at in range(0, len(samples), batch)]
    pixels = {name: way(parts[0]) for name, way in ways.items()}  # opens pipelines, too
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start_s = time.perf_counter()
            for part in parts:
                way(part)
            times_s[name].append(time.perf_counter() - start_s)
    reference = images_of(pixels[decoders.PILLOW])
    rows = []
    for name in names:
        rates = sorted(len(samples) / t for t in times_s[name])
        off = np.abs(images_of(pixels[name]) - reference)
        counts = opened[name].counts if opened[name] else decoders.Counts(pillow=1)
        row = {"decoder": name, "images_per_s": statistics.median(rates), "low": rates[0], "high": rates[-1]}
        row |= {"library_frac": counts.library / (counts.library + counts.pillow)}
        rows.append(row | {"mean_difference": float(off.mean()), "over_1_frac": float((off > 1).mean())})
    return rows


def images_of(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Equal pictures as one int16 array."""
    return np.stack(pixels).astype(np.int16)


def open_loader(config: DataConfig, corpus: Corpus, batch: int) -> Loader:
    """Micro-batches of ``batch`` images, whatever lies ready and `WARM_UP_BATCHES` taken off."""
    loader = build_loader(config, corpus, seed=SEED, global_batch_size=batch)
    ready = config.prefetch_batches * max(1, config.num_workers)
    for _ in range(ready + WARM_UP_BATCHES):
        next(loader)
    loader.take_waited_s()
    return loader


def time_loader(config: DataConfig, corpus: Corpus, batch: int, batches: int) -> dict:
    """Micro-batches taken as fast as they come: ``images_per_s``, ``seconds``."""
    with open_loader(config, corpus, batch) as loader:
        start_s = time.perf_counter()
        for _ in range(batches):
            next(loader)
        seconds = time.perf_counter() - start_s
    return {"images_per_s": batch * batches / seconds, "seconds": seconds}


def time_waiting(config: DataConfig, corpus: Corpus, batch: int, batches: int, step_s: float) -> dict:
    """``waiting_frac``: share of its time that a consumer waits which takes a micro-batch, then sleeps ``step_s``.

    That is a training process whose work is done by a GPU. What lies ready at the start is taken off, then it has
    `WARM_UP_BATCHES` to find its pace, so this is the long run.
    """
    with open_loader(config, corpus, batch) as loader:
        for _ in range(WARM_UP_BATCHES):
            next(loader)
            time.sleep(step_s)
        loader.take_waited_s()
        start_s = time.perf_counter()
        for _ in range(batches):
            next(loader)
            time.sleep(step_s)
        seconds = time.perf_counter() - start_s
        return {"step_s": step_s, "waiting_frac": loader.take_waited_s() / seconds, "seconds": seconds}


def loaders(data_path: Path, names: Sequence[str], workers: Sequence[int], side_px: int) -> list[DataConfig]:
    """Every decoder with every number of workers that it takes."""
    base = DataConfig(data_path=str(data_path), resolution_px=side_px)
    return [
        dataclasses.replace(base, image_decoder=name, num_workers=count)
        for count in workers
        for name in names
        if not (count and name == decoders.DALI_MIXED)
    ]
