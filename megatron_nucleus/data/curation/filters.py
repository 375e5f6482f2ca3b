"""First stage: look at every item once. Full decode, size and aspect limits, captions, content hash.

Cheap checks come before expensive ones. *Rejected* means usable but against the policy (size, aspect,
duplicate); *quarantined* means damaged or not usable. Both are listed with a reason and a reference.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from megatron_nucleus.data import images, index
from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation.captions import MAX_SIDECAR_BYTES, SideData, parse_sidecars
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

REJECTED = frozenset({"too_small", "too_large", "extreme_aspect", "file_too_large", "exact_duplicate"})

ITEM_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("item", pa.string()),
        ("container", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("extension", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("exif_orientation", pa.int8()),
        ("source_url", pa.string()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
        ("captions", pa.list_(index.CAPTION_TYPE)),
        ("tier", pa.string()),
        ("episode_bucket", pa.string()),
        ("metadata", pa.string()),  # JSON object, null when empty
    ]
)


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What an image must be to be kept, and how the kept ones are packed."""

    min_side_px: int = knob(256, "shortest side allowed", unit="px")
    max_side_px: int = knob(8096, "longest side allowed", unit="px")
    max_aspect: float = knob(3.0, "longest side / shortest side allowed; beyond it a crop loses over 40 %")
    max_pixels: int = knob(images.MAX_PIXELS, "larger headers are refused before decoding", unit="pixels")
    max_file_bytes: int = knob(256 << 20, "larger files are not read", unit="bytes")
    min_bucket_images: int = knob(8, "smaller aspect buckets join the nearest one", unit="images")
    max_shard_bytes: int = knob(512 << 20, "size at which a new shard begins", unit="bytes")
    source: str = knob("user", "name of this collection, stored with every image")

    def __post_init__(self) -> None:
        for name in ("min_side_px", "max_file_bytes", "max_shard_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: at least 1")
        if self.max_side_px < self.min_side_px:
            raise ConfigError(f"max_side_px {self.max_side_px} is below min_side_px {self.min_side_px}")
        if not self.max_aspect >= 1:
            raise ConfigError(f"max_aspect {self.max_aspect}: at least 1")
        if self.max_pixels > images.PILLOW_MAX_PIXELS:
            raise ConfigError(f"max_pixels {self.max_pixels}: at most {images.PILLOW_MAX_PIXELS}")
        if self.min_bucket_images < 0:
            raise ConfigError(f"min_bucket_images {self.min_bucket_images}: 0 or more")


def inspect_task(
    task: readers.Task,
    config: CurationConfig,
    folder: Path,
    skip: frozenset[int],
    started: Callable[[int], object],
) -> dict:
    """Inspect the items of a task; writes ``<task>.parquet`` (usable) and ``<task>.dropped.parquet``.

    Besides the counts of the stage contract: ``notes`` (harmless oddities) and ``with_captions``.
    """
    rows: list[dict] = []
    dropped: list[dict] = []
    notes: Counter[str] = Counter()
    items = readers.task_items(task)
    for number, item in enumerate(items):
        started(number)
        try:
            if number in skip:
                raise images.UnusableImage("decoder_crash", "decoding it ended the whole process")
            row, found = _inspect(task.root, item, config)
            rows.append(row)
            notes.update(found)
        except images.UnusableImage as problem:
            dropped.append(_dropped(item, problem))
    index.write_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA), folder / f"{task.name}.parquet")
    table = pa.Table.from_pylist(dropped, schema=index.QUARANTINE_SCHEMA)
    index.write_table(table, folder / f"{task.name}.dropped.parquet")
    verdicts = Counter((d["verdict"], d["reason"]) for d in dropped)
    return {
        "in": len(items),
        "kept": len(rows),
        "rejected": {r: n for (v, r), n in sorted(verdicts.items()) if v == "rejected"},
        "quarantined": {r: n for (v, r), n in sorted(verdicts.items()) if v == "quarantined"},
        "notes": dict(sorted(notes.items())),
        "with_captions": sum(1 for item in items if item.sidecars),
    }


def _inspect(root: str, item: readers.Item, config: CurationConfig) -> tuple[dict, list[str]]:
    if item.problem is not None:
        raise images.UnusableImage(*item.problem)
    payload = readers.read_reference(root, item.reference, config.max_file_bytes)
    header = images.open_image(payload, config.max_pixels)
    _check_size(header.width, header.height, config)
    side = parse_sidecars([_sidecar(root, name, ref) for name, ref in item.sidecars])
    decoded = images.decode_opened(header)
    notes = [*decoded.notes]
    if decoded.orientation != 1:
        notes.append("exif_rotated")
    if not images.matches_extension(readers.extension(item.name.encode()), decoded.format):
        notes.append("extension_mismatch")
    return _row(item, payload, decoded, side), notes


def _check_size(width: int, height: int, config: CurationConfig) -> None:
    short, long = min(width, height), max(width, height)
    if short < config.min_side_px:
        raise images.UnusableImage("too_small", f"{width} x {height} px, min_side_px {config.min_side_px}")
    if long > config.max_side_px:
        raise images.UnusableImage("too_large", f"{width} x {height} px, max_side_px {config.max_side_px}")
    if long > config.max_aspect * short:
        raise images.UnusableImage("extreme_aspect", f"{width} x {height} px, max_aspect {config.max_aspect}")


def _sidecar(root: str, name: str, reference: readers.Reference) -> tuple[str, bytes]:
    try:
        return name, readers.read_reference(root, reference, MAX_SIDECAR_BYTES)
    except images.UnusableImage as problem:
        raise images.UnusableImage("bad_caption", f"{name}: {problem}") from problem


def _row(item: readers.Item, payload: bytes, decoded: images.Decoded, side: SideData) -> dict:
    return {
        "id": hashlib.sha256(payload).hexdigest(),
        "item": item.name,
        "container": item.reference.path,
        "offset": item.reference.offset,
        "length": len(payload),
        "extension": images.EXTENSIONS[decoded.format],
        "width_px": decoded.image.width,
        "height_px": decoded.image.height,
        "exif_orientation": decoded.orientation,
        "source_url": side.source_url,
        "licence": side.licence,
        "attribution": side.attribution,
        "captions": [index.caption_dict(c) for c in side.captions],
        "tier": side.tier,
        "episode_bucket": side.episode_bucket,
        "metadata": side.metadata_json,
    }


def _dropped(item: readers.Item, problem: images.UnusableImage) -> dict:
    return {
        "item": item.name,
        "verdict": "rejected" if problem.reason in REJECTED else "quarantined",
        "reason": problem.reason,
        "detail": problem.detail.encode("utf-8", "backslashreplace").decode(),
        "stage": "inspect",
        "container": item.reference.path,
        "offset": item.reference.offset,
        "length": item.reference.length,
    }
