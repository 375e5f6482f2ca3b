"""Bytes -> RGB pixels, by one set of rules that curation and training share.

- The content decides the format; the file name does not. Formats: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF,
  JPEG 2000, PPM. A decode is always complete: a truncated file is an error.
- EXIF orientation is applied. Of a camera's multi-picture JPEG (MPO) the first picture counts; animations and
  files of several pages are refused.
- Transparency is composited on white. Grey, palette and CMYK become RGB; 16-bit grey is scaled, not
  clipped; floating-point, 32-bit and LAB pixels are refused: their range is not known.
- An embedded ICC profile is converted to sRGB. One that is broken or of another colour space is ignored, as
  browsers do, and noted.
- More pixels than ``max_pixels`` in the header are refused before anything is decoded.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, features

from megatron_nucleus.utils.errors import ConfigError

MAX_PIXELS = 8096 * 8096  # the side limit of Nucleus-Image, squared (its team's data-engineering blog)
UNUSABLE_REASONS = frozenset(  # every `UnusableImage.reason` that this module raises
    {
        "empty_file",
        "not_an_image",
        "unsupported_format",
        "undecodable",
        "decompression_bomb",
        "animated",
        "multipage",
        "unsupported_mode",
    }
)
PILLOW_MAX_PIXELS = 2 * 89_478_485  # above this Pillow itself refuses to open a file
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}
_FORMAT_OF_EXTENSION = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG"),
    **dict.fromkeys(("png", "apng"), "PNG"),
    **dict.fromkeys(("bmp", "dib"), "BMP"),
    **dict.fromkeys(("tif", "tiff"), "TIFF"),
    **dict.fromkeys(("jp2", "j2k", "jpf"), "JPEG2000"),
    **dict.fromkeys(("ppm", "pgm", "pbm", "pnm"), "PPM"),
    **dict.fromkeys(("heic", "heif"), "HEIF"),
    "webp": "WEBP",
    "gif": "GIF",
    "avif": "AVIF",
}
IMAGE_EXTENSIONS = frozenset(_FORMAT_OF_EXTENSION)
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")
_ICC_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}


class UnusableImage(Exception):
    """An image that cannot be used: ``reason`` is a short code for counting, ``detail`` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Decoded(NamedTuple):
    """A fully decoded image.

    image: RGB (or L where asked for), upright. format: Pillow's name of the real format. orientation: EXIF value as
    found (1-8). notes: codes of harmless oddities (``icc_ignored``).
    """

    image: Image.Image
    format: str
    orientation: int
    notes: tuple[str, ...]


class JpegHeader(NamedTuple):
    """Size of a JPEG as it is stored, and its EXIF orientation (1-8)."""

    width_px: int
    height_px: int
    orientation: int


def sniff(head: bytes) -> str | None:
    """Format by magic bytes (the first 32 suffice), ``HEIF`` for the one we know and cannot read, or None."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8:32]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if any(b in brands for b in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")):
            return "HEIF"
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n":
        return "PPM"
    return None


def matches_extension(extension: str, format: str) -> bool:
    """Whether a file name's extension (lower case, no dot) is one of the format that the content has."""
    return _FORMAT_OF_EXTENSION.get(extension) == ("JPEG" if format == "MPO" else format)


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silence Pillow's warnings about odd metadata; what matters is raised or noted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\..*)?")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def open_image(payload: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only, and refuse what must not be decoded.

    Raises:
        UnusableImage: empty_file, not_an_image, unsupported_format, undecodable, decompression_bomb.
    """
    if not payload:
        raise UnusableImage("empty_file", "0 bytes")
    name = sniff(payload[:32])
    if name is None:
        raise UnusableImage("not_an_image", f"starts with {payload[:12]!r}")
    if name not in EXTENSIONS or (name == "AVIF" and not features.check("avif")):
        raise UnusableImage("unsupported_format", f"{name}; convert it to JPEG or PNG")
    try:
        image = Image.open(io.BytesIO(payload), formats=[name])
    except Image.DecompressionBombError as error:
        raise UnusableImage("decompression_bomb", str(error)) from error
    except Exception as error:  # decoders raise nearly any type on damaged input
        raise UnusableImage("undecodable", _describe(error)) from error
    if image.width * image.height > max_pixels:
        raise UnusableImage(
            "decompression_bomb", f"{image.width} x {image.height} px, limit {max_pixels} pixels"
        )
    return image


def decode(payload: bytes, max_pixels: int = MAX_PIXELS, draft_px: tuple[int, int] | None = None) -> Decoded:
    """Decode completely into an upright RGB image: `open_image`, then `decode_opened`."""
    return decode_opened(open_image(payload, max_pixels), draft_px)


def decode_opened(
    image: Image.Image, draft_px: tuple[int, int] | None = None, *, grey: bool = False
) -> Decoded:
    """Decode completely into an upright RGB image by the rules of this module.

    draft_px: (width, height) as stored; lets a JPEG decode at 1/2, 1/4 or 1/8, never below this size. The whole file is
    read all the same, so damage is found as in a full decode.
    grey: give the luminance instead, mode L. Of a JPEG that needs no colour conversion only that is decoded, which is
    up to a third faster.

    Raises:
        UnusableImage: animated, multipage, unsupported_mode; undecodable when damaged.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: truncated images would pass as whole ones"
        )
    notes = _grey_notes(image) if grey else None
    try:
        if image.format in ("JPEG", "MPO") and (draft_px is not None or notes is not None):
            image.draft(image.mode if notes is None else "L", draft_px or image.size)
        image.load()
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        frames = getattr(image, "n_frames", 2) if animated else 1  # may read on, into damage
        orientation = _orientation(image)
    except Exception as error:  # decoders raise nearly any type on damaged input
        raise UnusableImage("undecodable", _describe(error)) from error
    if animated:
        kind = "multipage" if image.format == "TIFF" else "animated"
        raise UnusableImage(kind, f"{frames} frames; extract the one you want")
    try:
        picture, notes = _to_rgb(image) if notes is None else (image, notes)
        picture = _in_mode(picture, "L") if grey else picture
    except UnusableImage:
        raise
    except Exception as error:  # a lazily read part of the file can still be damaged
        raise UnusableImage("undecodable", _describe(error)) from error
    if orientation != 1:
        picture = picture.transpose(_TRANSPOSE[orientation])
    return Decoded(picture, str(image.format), orientation, notes)


def _grey_notes(image: Image.Image) -> tuple[str, ...] | None:
    """Notes on a colour JPEG whose luminance can be decoded alone; None for all others."""
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    profile = image.info.get("icc_profile")
    transform = _icc_transform(bytes(profile), image.mode) if profile else None
    return () if transform is None else ("icc_ignored",) if transform == "ignore" else None


def plain_jpeg(payload: bytes) -> JpegHeader | None:
    """Header of a JPEG that any decoder turns into the same colours: one RGB or grey picture, no profile but sRGB.

    None for every other file, damaged ones included: `decode` says what is wrong with those.
    """
    try:
        image = open_image(payload, PILLOW_MAX_PIXELS)
        if image.format != "JPEG" or image.mode not in ("RGB", "L"):
            return None
        profile = image.info.get("icc_profile")
        if profile and _icc_transform(bytes(profile), image.mode) not in (None, "ignore"):
            return None
        return JpegHeader(image.width, image.height, _orientation(image))
    except Exception:  # decoders raise nearly any type on damaged input
        return None


def load_pixels(payload: bytes, width: int, height: int) -> np.ndarray:
    """Decode, then fit into ``width`` x ``height`` px; returns uint8 RGB [height, width, 3].

    Raises:
        UnusableImage: see `decode`.
    """
    image = open_image(payload, PILLOW_MAX_PIXELS)
    try:
        draft_px = _draft_size(image, width, height) if image.format in ("JPEG", "MPO") else None
    except Exception as error:  # damaged EXIF
        raise UnusableImage("undecodable", _describe(error)) from error
    return np.asarray(fit(decode_opened(image, draft_px).image, width, height))


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale (Lanczos) and centre-crop to ``width`` x ``height`` px: never distorts, crops the least.

    A smaller image is enlarged; curation's ``min_side_px`` decides how small one may be.
    """
    if image.size == (width, height):
        return image
    box = crop_box(image.width, image.height, width / height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def crop_box(width: int, height: int, ratio: float) -> tuple[float, float, float, float]:
    """Largest centred box (left, top, right, bottom) of an image that has width / height == ``ratio``."""
    if width > height * ratio:
        margin = (width - height * ratio) / 2
        return margin, 0.0, width - margin, float(height)
    margin = (height - width / ratio) / 2
    return 0.0, margin, float(width), height - margin


def _draft_size(image: Image.Image, width: int, height: int) -> tuple[int, int]:
    """Size at which a JPEG that will be fitted into ``width`` x ``height`` px may be decoded.

    Twice the size that it is scaled to, so that the last factor of two is Lanczos' and the quality is kept.
    """
    if _orientation(image) >= 5:  # stored sideways
        width, height = height, width
    scale = 2 * max(width / image.width, height / image.height)
    return math.ceil(image.width * scale), math.ceil(image.height * scale)


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if image.mode in _GREY16 or (image.mode == "I" and image.format == "PNG"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F", "LAB") or ";" in image.mode:
        raise UnusableImage("unsupported_mode", f"{image.format} with pixels of mode {image.mode}")
    space = "L" if image.mode in ("1", "L", "LA", "La") else "CMYK" if image.mode == "CMYK" else "RGB"
    if image.mode not in ("LA", "La", "RGBA", "RGBa", "PA") and "transparency" not in image.info:
        return _to_srgb(_in_mode(image, space), image.info.get("icc_profile"))
    with_alpha = image.convert("LA" if space == "L" else "RGBA")
    alpha = with_alpha.getchannel("A")
    rgb, notes = _to_srgb(with_alpha.convert(space), image.info.get("icc_profile"))
    if alpha.getextrema() != (255, 255):
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, (255, 255, 255)), alpha)
    return rgb, notes


def _grey16_to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if "transparency" in image.info:
        raise UnusableImage("unsupported_mode", "16-bit grey with a transparent value")
    values = np.asarray(image).astype(np.uint32)
    if values.size and values.max() > 65535:
        raise UnusableImage("unsupported_mode", "grey values above 16 bits")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return _to_srgb(Image.fromarray(grey), image.info.get("icc_profile"))


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    if profile:
        transform = _icc_transform(bytes(profile), image.mode)
        if transform == "ignore":
            return _in_mode(image, "RGB"), ("icc_ignored",)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            if converted is not None:
                return converted, ()
    return _in_mode(image, "RGB"), ()


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert; an image that has the mode already is not copied, which costs as much as a sixth of its decode."""
    return image if image.mode == mode else image.convert(mode)


@functools.lru_cache(maxsize=64)
def _icc_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str | None:
    """Transform to sRGB; None when the profile is sRGB already; ``ignore`` when it cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _ICC_SPACE[mode]:
            return "ignore"
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "ignore"


def _describe(error: Exception) -> str:
    """One line, the same on every run: no memory addresses."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300]
