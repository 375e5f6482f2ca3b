"""A small data set with everything that is looked up: captions, scores, copies and a quarantine."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_nucleus.data import index
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json
from tests.data.corpora import SIZES, picture

BUCKETS = ("1024x1024", "1344x768")
COPY = {"id": "00" * 32, "source_id": "x", "relation": "near_duplicate", "distance": 2}


def make(folder, count=30, seed=0):
    """Samples in two buckets with captions, scores and copies; returns their index rows in order."""
    rng = np.random.default_rng(seed)
    writer = DatasetWriter(folder, tool="test", settings={}, max_shard_bytes=40_000)
    rows = []
    for n in range(count):
        bucket = BUCKETS[n % 2]
        payload = picture(rng, SIZES[bucket])
        texts = (
            [f"a Red house number {n}", "THE sea, 100 % blue"]
            if n % 5 == 0
            else [f"a green house number {n}"]
        )
        captions = [{"text": t, "length_class": "short", "source": "web" if n % 3 else "user"} for t in texts]
        row = {
            "id": hashlib.sha256(payload).hexdigest(),
            "source_id": f"in/{n}.png",
            "source": "tests",
            "licence": ("MIT", None, "CC0-1.0")[n % 3],
            "aspect_bucket": bucket,
            "tier": (None, "A1", "A2")[n % 3],
            "episode_bucket": "B3" if n % 4 else None,
            "width_px": SIZES[bucket][0],
            "height_px": SIZES[bucket][1],
            "captions": captions,
            "scores": [{"scorer": "s", "revision": "s@1", "value": n / 10}] if n % 2 else [],
            "phash": bytes(range(8)),
            "duplicates": [COPY] * (n // 28),
            "stage_versions": {"inspect": "abc"},
        }
        rows.append(row)
        writer.add(
            row, {"png": payload, "json": encode_json({"id": row["id"], "captions": captions, "n": n})}
        )
    quarantine = index.ParquetParts(folder / "quarantine", index.QUARANTINE_SCHEMA)
    gone = {
        "item": "gone.png",
        "verdict": "rejected",
        "reason": "blurry",
        "detail": "not sharp",
        "stage": "blur",
    }
    quarantine.add({**gone, "sha256": "f" * 64, "width_px": 80, "height_px": 60, "container": b"g"})
    for item in ("cut.png", "other/3.png", "others/3.png"):
        cut = {"verdict": "quarantined", "reason": "undecodable", "detail": "cut", "stage": "inspect"}
        quarantine.add({"item": item, **cut, "container": b"c"})
    quarantine.close()
    writer.finish({"seen": count, "kept": count})
    return rows
