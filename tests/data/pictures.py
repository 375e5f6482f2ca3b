"""JPEGs of every kind that a decoder may meet, drawn from one photograph-like picture."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, ImageCms


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some edges and a little noise: what a JPEG was made for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(2 * np.pi * (f * x + g * y) + p) for f, g, p in rng.uniform(0.5, 4, (3, 3))]
    pixels = 128 + 70 * np.stack(waves, -1) + rng.normal(0, 3, (height, width, 3))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 60)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    """The file of an image; orientation: EXIF value."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, "exif": exif, **options})
    return buffer.getvalue()


def with_profile(image: Image.Image, space: str = "LAB") -> bytes:
    """A JPEG with an embedded profile: sRGB's own, or one of another space."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    return jpeg(image, icc_profile=profile)


def wide_gamut(image: Image.Image) -> bytes:
    """A JPEG whose profile is RGB but not sRGB: sRGB's with another description and red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    entries = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    renamed = bytes(profile).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    return jpeg(image, icc_profile=renamed)


def content_id(payload: bytes) -> str:
    """Hex sha256, as data sets name their samples."""
    return hashlib.sha256(payload).hexdigest()
