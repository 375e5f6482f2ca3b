"""First stage: look at every image once. Header, limits, captions, decode, measures, content hash.

Cheap checks come before expensive ones, each with its own reason. *Rejected* means usable but against the policy (size,
aspect, compression); *quarantined* means damaged or not usable. Bytes that can be read are hashed before any check, so
that an image that is dropped can be looked up by its hash; where the header can be read, its size is noted, too.

A JPEG is decoded at the fraction of its size that `measures` needs. That walks through the whole file, as a full decode
does, so damage and a missing end are found all the same; other formats are decoded in full.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import ExifTags, Image

from megatron_nucleus.data import images, index
from megatron_nucleus.data.curation import captions, compression, measures, readers
from megatron_nucleus.data.curation.captions import SideData
from megatron_nucleus.data.curation.stage import REFERENCE_COLUMNS, Drop, Row, row_stage
from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What an image and its captions must be to be looked at further."""

    min_side_px: int = knob(256, "shortest side allowed", unit="px")
    max_side_px: int = knob(8096, "longest side allowed", unit="px")
    max_aspect: float = knob(3.0, "longest side / shortest side allowed; beyond it a crop loses over 40 %")
    # The published recipe has a filter for over-compression without a threshold; both defaults are our own choice. On
    # photographs, quality 15 and below shows blocks in a JPEG, and WebP looks alike (structural similarity 0.87 to the
    # original) at 10, which reads as 6 to 14 in its header. See tests/data/curation/test_compression.py.
    min_jpeg_quality: float = knob(
        18.0, "quality that a JPEG's quantisation tables stand for; 0: any", unit="quality 0-100"
    )
    min_webp_quality: float = knob(
        6.0, "quality that a lossy WebP's quantiser stands for; 0: any", unit="quality 0-100"
    )
    require_captions: bool = knob(True, "off where a captioner stage writes them")

    def __post_init__(self) -> None:
        if self.min_side_px < 1:
            raise ConfigError(f"min_side_px {self.min_side_px}: at least 1")
        if self.max_side_px < self.min_side_px:
            raise ConfigError(f"max_side_px {self.max_side_px} is below min_side_px {self.min_side_px}")
        if not self.max_aspect >= 1:
            raise ConfigError(f"max_aspect {self.max_aspect}: at least 1")
        for name in ("min_jpeg_quality", "min_webp_quality"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"{name} {getattr(self, name)}: 0 to 100")


_LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF")  # of WebP: where it has no quantiser
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")  # Pillow's names

_ADDS = {
    "id": pa.string(),  # hex sha256 of the bytes
    "length": pa.int64(),  # how many they are; readers leave it open for a whole file
    "extension": pa.string(),  # that of the real format
    "width_px": pa.int32(),  # as displayed: after the EXIF orientation
    "height_px": pa.int32(),
    "exif_orientation": pa.int8(),  # as found, 1-8
    "source_url": pa.string(),
    "licence": pa.string(),
    "attribution": pa.string(),
    "captions": pa.list_(index.CAPTION_TYPE),
    "tier": pa.string(),
    "episode_bucket": pa.string(),
    "metadata": pa.string(),  # JSON object, null when empty
    "coding_quality": pa.float32(),  # 0-100: what the file's coding left; 100: lossless, null: it does not tell
    "notes": pa.list_(pa.string()),  # exif_rotated, extension_mismatch, icc_ignored, caption_dropped
    **measures.COLUMNS,
}


@row_stage(
    InspectConfig,
    reads=(*REFERENCE_COLUMNS, "sidecars", "problem", "given"),
    adds=_ADDS,
    rejects=("file_too_large", "too_small", "too_large", "extreme_aspect", "over_compressed"),
    quarantines=tuple(sorted(captions.CAPTION_REASONS)),
    batch_rows=8,  # as many as are measured at once; their bytes are in memory together
    modules=(captions, compression, images, measures),
)
def inspect(rows: Sequence[Row], config: InspectConfig) -> list[dict[str, Any] | Drop]:
    """Check that each image is whole and within the limits, and measure it."""
    results: list[dict[str, Any] | Drop] = []
    glances: dict[int, measures.Glance] = {}
    for at, row in enumerate(rows):
        seen = _Seen()
        try:
            found, glances[at] = _inspect(row, config, seen)
            results.append(found)
        except UnusableImage as problem:
            results.append(Drop(problem.reason, problem.detail, seen.id, *seen.displayed_size()))
    for at, plain in zip(list(glances), measures.of_one_lightness([*glances.values()]), strict=True):
        try:
            if plain:
                glances[at] = glances[at]._replace(colours=_colours(rows[at]))
        except UnusableImage as problem:  # damage in the colours alone
            known = {name: results[at][name] for name in ("id", "width_px", "height_px")}
            results[at] = Drop(problem.reason, problem.detail, **known)
            del glances[at]
    for at, measured in zip(glances, measures.measure([*glances.values()]), strict=True):
        results[at].update(measured._asdict())
    return results


@dataclasses.dataclass
class _Seen:
    """What is known of a picture so far, should a check drop it. header: as opened; size_px: as stored."""

    id: str | None = None
    header: Image.Image | None = None
    size_px: tuple[int, int] | None = None

    def displayed_size(self) -> tuple[int | None, int | None]:
        """(width, height) after the EXIF orientation where it stands before the pixels; the header is done with."""
        if self.header is None or self.size_px is None:
            return None, None
        try:
            # The method of the class: PNG's own one decodes the picture to look behind the pixels, too.
            orientation = Image.Image.getexif(self.header).get(ExifTags.Base.Orientation)
        except Exception:  # damaged EXIF raises nearly any type; the row is dropped in any case
            orientation = None
        return self.size_px[::-1] if orientation in (5, 6, 7, 8) else self.size_px


def _inspect(row: Row, config: InspectConfig, seen: _Seen) -> tuple[dict[str, Any], measures.Glance]:
    """All columns but the measures, and what those are made from. seen: filled on the way."""
    if row["problem"] is not None:
        raise UnusableImage(row["problem"]["reason"], row["problem"]["detail"])
    payload = row.payload()
    seen.id = hashlib.sha256(payload).hexdigest()
    header = seen.header = row.open()
    seen.size_px = header.size  # a draft changes it
    _check_size(header.width, header.height, config)
    quality = compression.quality(header, payload)
    _check_compression(str(header.format), quality, config)
    coding_quality = _coding_quality(header, quality)  # of the header as it is before the decode
    side = _side_data(row, config)
    decoded, size_px = _decode(header)
    notes = [*decoded.notes, *side.notes]
    if decoded.orientation != 1:
        notes.append("exif_rotated")
    if not images.matches_extension(readers.extension(row["item"].encode()), decoded.format):
        notes.append("extension_mismatch")
    found = {
        "id": seen.id,
        "length": len(payload),
        "extension": images.EXTENSIONS[decoded.format],
        "width_px": size_px[0],
        "height_px": size_px[1],
        "exif_orientation": decoded.orientation,
        "source_url": side.source_url,
        "licence": side.licence,
        "attribution": side.attribution,
        "captions": [index.caption_dict(caption) for caption in side.captions],
        "tier": side.tier,
        "episode_bucket": side.episode_bucket,
        "metadata": side.metadata_json,
        "coding_quality": coding_quality,
        "notes": notes,
    }
    return found, measures.look(decoded.image, size_px)


def _check_size(width: int, height: int, config: InspectConfig) -> None:
    short, long = min(width, height), max(width, height)
    if short < config.min_side_px:
        raise UnusableImage("too_small", f"{width} x {height} px, min_side_px {config.min_side_px}")
    if long > config.max_side_px:
        raise UnusableImage("too_large", f"{width} x {height} px, max_side_px {config.max_side_px}")
    if long > config.max_aspect * short:
        raise UnusableImage("extreme_aspect", f"{width} x {height} px, max_aspect {config.max_aspect}")


def _check_compression(format: str, quality: float | None, config: InspectConfig) -> None:
    name = "min_webp_quality" if format == "WEBP" else "min_jpeg_quality"
    if quality is not None and quality < getattr(config, name):
        detail = f"{format} of quality {quality:.1f}, {name} {getattr(config, name):g}"
        raise UnusableImage("over_compressed", detail)


def _coding_quality(header: Image.Image, quality: float | None) -> float | None:
    """What the coding left of the picture, 0..100; None where the header does not tell.

    quality: of a lossy file, as `compression.quality` reads it. None also for a file of few colours, which may be
    a drawing or the poor copy of a photograph, and for JPEG inside TIFF.
    """
    if quality is not None:
        return quality
    few_colours = header.mode in ("1", "P", "PA")
    lossless = header.format in _LOSSLESS and header.info.get("compression") not in _LOSSY_IN_TIFF
    return 100.0 if lossless and not few_colours else None


def _side_data(row: Row, config: InspectConfig) -> SideData:
    files = [(entry["name"], _read_sidecar(row, entry)) for entry in row["sidecars"] or ()]
    return captions.parse_sidecars(files, row["given"], require_captions=config.require_captions)


def _read_sidecar(row: Row, entry: Mapping[str, Any]) -> bytes:
    try:
        return row.read(entry, captions.MAX_SIDECAR_BYTES)
    except UnusableImage as problem:
        reason = "unreadable" if problem.reason == "unreadable" else "bad_caption"  # the first may pass
        raise UnusableImage(reason, f"{entry['name']}: {problem}") from problem


def _decode(header: Image.Image) -> tuple[images.Decoded, tuple[int, int]]:
    """The luminance at a size that is enough to measure it, and the picture's size (width, height) as displayed."""
    full = header.size
    decoded = images.decode_opened(header, measures.draft_size(full), grey=True)
    if header.format not in ("JPEG", "MPO"):
        return decoded, decoded.image.size
    return decoded, full if decoded.orientation < 5 else full[::-1]


def _colours(row: Row) -> bytes:
    """Colours of a picture that was decoded as luminance before."""
    header = row.open()
    return measures.sample_colours(images.decode_opened(header, measures.draft_size(header.size)).image)
