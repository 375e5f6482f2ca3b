"""Small data sets for tests: random pictures in three aspect buckets, with captions, tiers and episode buckets."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_nucleus.data.dataset import pack_empty_text, pack_features
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json

SIZES = {"1024x1024": (40, 40), "1344x768": (70, 40), "768x1344": (45, 80)}  # width, height in px
CLASSES = ("short", "medium", "detailed")


def caption(text: str, length_class: str) -> dict:
    """A caption as a sample's JSON holds it."""
    return {"text": text, "length_class": length_class, "source": "test"}


def picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """PNG of random pixels."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_tiered(
    folder: Path, cells: dict[str, dict[tuple[str, str], int]], damaged: tuple[int, ...] = ()
) -> Path:
    """A curated folder with so many images per bucket and (tier, episode bucket), in a mixed order.

    Every image has one caption of each class, ``<number> <class>``. damaged: numbers of images that do not decode.
    """
    writer = DatasetWriter(folder, tool="test", settings={})
    rng = np.random.default_rng(0)
    places = [(b, c) for b, counts in cells.items() for c, n in counts.items() for _ in range(n)]
    for number, place in enumerate(rng.permutation(len(places)).tolist()):
        bucket, (tier, episode) = places[place]
        payload = picture(rng, SIZES[bucket])
        row = {"id": hashlib.sha256(payload).hexdigest(), "aspect_bucket": bucket, "tier": tier}
        row |= {"episode_bucket": episode, "width_px": SIZES[bucket][0], "height_px": SIZES[bucket][1]}
        info = encode_json({"captions": [caption(f"{number} {name}", name) for name in CLASSES]})
        writer.add(row, {"png": payload[:300] if number in damaged else payload, "json": info})
    writer.finish({})
    return folder


def make_encoded(folder: Path, count: int = 20, **encoded: object) -> dict[str, tuple]:
    """An encoded folder of square images; returns id -> (latents [4, 8, 8], {caption text: features [L, 6]})."""
    spec = {"codec": {}, "text_encoder": {}, "resolution_px": 32, **encoded}
    writer = DatasetWriter(folder, tool="encode", settings={}, encoded=spec)
    empty = torch.full((2, 6), -1.0)
    writer.add_file("empty_text.safetensors", pack_empty_text(empty))
    stored = {}
    for i in range(count):
        latents, texts = torch.randn(4, 8, 8), [torch.randn(n, 6) for n in (1 + i % 5, 7)]
        sample_id = f"{i:064x}"
        captions = [caption(f"{i} short", "short"), caption(f"{i} detailed", "detailed")]
        features = dict(zip((c["text"] for c in captions), texts, strict=True)) | {"": empty}
        stored[sample_id] = (latents, features)
        members = {"safetensors": pack_features(latents, texts), "json": encode_json({"captions": captions})}
        writer.add({"id": sample_id, "aspect_bucket": "1024x1024"}, members)
    writer.finish({})
    return stored
