"""Quality of lossy files by their headers: equal to what the encoder was told, whatever the content."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from megatron_nucleus.data.curation.compression import quality, vp8_quantiser
from megatron_nucleus.data.curation.stages.inspect import InspectConfig

PHOTOGRAPHS = ("astronaut.png", "camera.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg")


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def quality_of(payload: bytes) -> float | None:
    return quality(Image.open(io.BytesIO(payload)), payload)


@pytest.fixture(scope="module")
def photographs(photos) -> list[Image.Image]:
    return [photos[name].convert("RGB") for name in PHOTOGRAPHS]


@pytest.mark.parametrize("told", [5, 10, 15, 20, 30, 50, 75, 90, 95])
def test_jpeg_quality_is_what_the_encoder_was_told(photographs, told):
    flat = Image.new("RGB", (64, 64), "white")
    for picture in (photographs[2], flat, photographs[0].convert("L")):
        for options in ({}, {"progressive": True}, {"subsampling": 0}):
            assert quality_of(encoded(picture, "JPEG", quality=told, **options)) == pytest.approx(
                told, abs=0.6
            )


def test_webp_quality_follows_what_the_encoder_was_told(photographs):
    told = (1, 5, 10, 20, 30, 50, 75, 90, 100)
    for picture in photographs:
        found = [quality_of(encoded(picture, "WEBP", quality=q)) for q in told]
        assert found == sorted(found)
        # The encoder spreads its segments around what it was told: by a third at most (measured), then none at 100.
        assert found == pytest.approx(told, rel=0.6, abs=2)
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"
    with_chunks = encoded(photographs[0], "WEBP", quality=20, exif=exif, icc_profile=b"x" * 77)
    assert quality_of(with_chunks) == quality_of(encoded(photographs[0], "WEBP", quality=20))
    see_through = photographs[0].copy()
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    assert quality_of(encoded(see_through, "WEBP", quality=20)) == pytest.approx(20, rel=0.4)


def test_other_files_have_no_quality(photographs):
    lossless = encoded(photographs[0], "WEBP", lossless=True)
    assert quality_of(lossless) is None
    for format in ("PNG", "JPEG2000", "GIF"):
        assert quality_of(encoded(photographs[0], format)) is None


def test_the_defaults_part_what_is_visibly_damaged_from_what_is_not(photographs):
    """Figures behind the defaults: structural similarity to the original, median over photographs."""
    config = InspectConfig()

    def judged(format: str, told: int, limit: float) -> tuple[int, float]:
        similar, dropped = [], 0
        for picture in photographs:
            payload = encoded(picture, format, quality=told)
            dropped += quality_of(payload) < limit
            again = Image.open(io.BytesIO(payload)).convert("L")
            similar.append(structural_similarity(np.asarray(picture.convert("L")), np.asarray(again)))
        return dropped, float(np.median(similar))

    for told, all_dropped in ((5, True), (10, True), (15, True), (20, False), (30, False)):
        dropped, similar = judged("JPEG", told, config.min_jpeg_quality)
        assert dropped == (len(photographs) if all_dropped else 0)
        assert (similar < 0.875) == all_dropped, (told, similar)
    assert judged("WEBP", 1, config.min_webp_quality)[0] == len(photographs)
    assert judged("WEBP", 10, config.min_webp_quality)[0] == 0
    assert judged("WEBP", 10, config.min_webp_quality)[1] == pytest.approx(0.87, abs=0.02)


def test_size_does_not_tell_the_quality(photos):
    """Why it is not bits per pixel."""

    def bits_per_px(picture: Image.Image, told: int) -> float:
        return 8 * len(encoded(picture, "JPEG", quality=told)) / (picture.width * picture.height)

    plain, rich = photos["rocket.jpg"].convert("RGB"), photos["china.jpg"].convert("RGB")
    assert bits_per_px(plain, 30) < bits_per_px(rich, 10)
    diagram = Image.new("RGB", (1600, 1200), "white")
    diagram.paste((200, 30, 30), (100, 100, 300, 400))
    assert bits_per_px(diagram, 95) < bits_per_px(plain, 5)
    assert quality_of(encoded(diagram, "JPEG", quality=95)) == pytest.approx(95, abs=0.6)


def test_damaged_headers_give_a_number_or_none(photographs):
    payload = encoded(photographs[0].resize((64, 64)), "WEBP", quality=30)
    rng = np.random.default_rng(0)
    for length in range(0, 60):
        assert vp8_quantiser(payload[:length]) is None or length > 20
    for _ in range(300):
        damaged = bytearray(payload[: rng.integers(12, len(payload))])
        damaged[rng.integers(12, len(damaged)) :] = rng.bytes(12)
        value = vp8_quantiser(bytes(damaged))
        assert value is None or 0 <= value <= 127
    endless = payload[:12] + b"JUNK" + struct.pack("<I", 0xFFFFFFFF) + payload[12:]
    assert vp8_quantiser(endless) is None
