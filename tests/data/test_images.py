"""Bytes -> pixels: every odd kind of image is either decoded by the written rule or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, features

from megatron_nucleus.data.images import (
    MAX_PIXELS,
    UnusableImage,
    crop_box,
    decode,
    fit,
    load_pixels,
    open_image,
    quiet_decoding,
    sniff,
)
from megatron_nucleus.utils.errors import ConfigError

OTHER = ("decompression_bomb", "unsupported_mode", "unsupported_format", "multipage")


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(payload: bytes) -> np.ndarray:
    return np.asarray(decode(payload).image).astype(int)


def reason_of(payload: bytes, **options) -> str:
    with pytest.raises(UnusableImage) as caught:
        decode(payload, **options)
    return caught.value.reason


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    return photos["chelsea.png"].convert("RGB").resize((151, 97))


AVIF = pytest.param(
    "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", AVIF, "JPEG2000"])
def test_every_format_gives_the_photograph(photo, format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 98}}.get(format, {})
    payload = save(photo, format, **options)
    decoded = decode(payload)
    assert decoded.format == format
    assert sniff(payload[:32]) == format
    error = np.abs(np.asarray(decoded.image).astype(int) - np.asarray(photo).astype(int)).mean()
    limit = {"JPEG": 2, "AVIF": 2, "GIF": 8}.get(format, 0)
    assert error <= limit, error


def test_cmyk_is_converted(photo):
    for image in (photo.convert("CMYK"),):
        got = pixels(save(image, "JPEG", quality=98))
        assert np.abs(got - np.asarray(photo).astype(int)).mean() < 3


def test_palette_grey_and_one_bit(photo):
    palette = photo.quantize(64)
    assert (pixels(save(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    grey = photo.convert("L")
    assert (pixels(save(grey, "PNG")) == np.asarray(grey)[..., None]).all()
    bilevel = photo.convert("1")
    assert (pixels(save(bilevel, "PNG")) == np.asarray(bilevel)[..., None] * 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(photo):
    grey = np.asarray(photo.convert("L")).astype(np.uint16)
    payload = save(Image.fromarray(grey * 257), "PNG")
    assert (pixels(payload) == grey[..., None]).all()
    assert (pixels(save(Image.fromarray(grey * 257), "TIFF")) == grey[..., None]).all()


def test_transparency_is_composited_on_white(photo):
    rgb = np.asarray(photo).astype(int)
    alpha = np.linspace(0, 255, rgb.shape[1]).astype(np.uint8)[None].repeat(rgb.shape[0], 0)
    rgba = np.dstack([rgb.astype(np.uint8), alpha])
    want = rgb * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(pixels(save(Image.fromarray(rgba), "PNG")) - want).max() <= 1
    grey_alpha = Image.fromarray(rgba).convert("LA")
    want = np.asarray(grey_alpha)[..., :1] * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert np.abs(pixels(save(grey_alpha, "PNG")) - want).max() <= 1


def test_a_transparent_palette_entry_becomes_white(photo):
    palette = photo.quantize(8)
    index = np.asarray(palette)[40, 70]
    got = pixels(save(palette, "PNG", transparency=int(index)))
    clear = np.asarray(palette) == index
    assert (got[clear] == 255).all()
    assert (got[~clear] == np.asarray(palette.convert("RGB"))[~clear]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(photo, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = save(photo, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    decoded = decode(payload)
    tagged = photo.copy()
    tagged.getexif()[0x0112] = orientation
    assert (np.asarray(decoded.image) == np.asarray(ImageOps.exif_transpose(tagged))).all()
    assert decoded.image.size == ((97, 151) if orientation > 4 else (151, 97))
    if format != "TIFF":  # Pillow turns TIFFs itself
        assert decoded.orientation == orientation


def test_an_impossible_orientation_counts_as_upright(photo):
    exif = Image.Exif()
    exif[0x0112] = 42
    decoded = decode(save(photo, "PNG", exif=exif))
    assert decoded.orientation == 1
    assert decoded.image.size == photo.size


def swapped_profile() -> bytes:
    """An RGB profile whose red and green primaries are exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be")))
    count = struct.unpack(">I", profile[128:132])[0]
    for i in range(count):
        at = 132 + 12 * i
        tag = bytes(profile[at : at + 4])
        if tag in (b"rXYZ", b"gXYZ"):
            profile[at : at + 4] = b"gXYZ" if tag == b"rXYZ" else b"rXYZ"
    return bytes(profile)


def test_an_icc_profile_is_converted_to_srgb(photo):
    decoded = decode(save(photo, "PNG", icc_profile=swapped_profile()))
    got, original = np.asarray(decoded.image).astype(int), np.asarray(photo).astype(int)
    assert decoded.notes == ()
    assert np.abs(got - original[..., [1, 0, 2]]).max() <= 2


def test_srgb_profile_changes_nothing_and_a_broken_one_is_noted(photo):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decoded = decode(save(photo, "PNG", icc_profile=srgb))
    assert (np.asarray(decoded.image) == np.asarray(photo)).all()
    assert decoded.notes == ()
    for profile, image in ((b"not a profile", photo), (srgb, photo.convert("L"))):
        decoded = decode(save(image, "PNG", icc_profile=profile))
        assert (np.asarray(decoded.image) == np.asarray(image.convert("RGB"))).all()
        assert decoded.notes == ("icc_ignored",)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", AVIF])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(photo, format, part):
    payload = save(photo, format)
    assert reason_of(payload[: int(len(payload) * part)]) in ("undecodable", "unsupported_format")


def test_truncation_is_never_tolerated(photo, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        decode(save(photo, "PNG"))


def verdict(payload: bytes) -> str:
    """``usable`` or the reason; anything but UnusableImage is a failure of the test."""
    with quiet_decoding():
        try:
            assert decode(payload).image.mode == "RGB"
            return "usable"
        except UnusableImage as problem:
            return problem.reason


def test_what_is_no_image(photo):
    assert reason_of(b"") == "empty_file"
    assert reason_of(b"<!DOCTYPE html><html>404</html>") == "not_an_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "not_an_image"  # would run an interpreter
    assert reason_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)) == "unsupported_format"
    assert reason_of(b"\xff\xd8\xff" + bytes(100)) == "undecodable"
    assert reason_of(b"BM") == "undecodable"


def test_random_bytes_behind_every_magic_never_crash():
    heads = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\1\0\0WEBPVP8 ", b"BM", b"II*\0",
             b"\0\0\0\x0cjP  \r\n\x87\n", b"P6 9 9 255\n", b"\0\0\0\x20ftypavif"]  # fmt: skip
    rng = np.random.default_rng(0)
    for head in heads:
        for length in (0, 7, 64, 999):
            payload = head + rng.integers(0, 256, length, dtype=np.uint8).tobytes()
            assert verdict(payload) in {
                "usable",
                "undecodable",
                "decompression_bomb",
                "not_an_image",
                "unsupported_mode",
            }


def test_flipped_bytes_never_crash(photo):
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        payload = bytearray(save(photo, format))
        for _ in range(20):
            damaged = payload.copy()
            for at in rng.integers(0, len(damaged), 8):
                damaged[at] = rng.integers(0, 256)
            assert verdict(bytes(damaged)) in {"usable", "undecodable", "not_an_image", "animated", *OTHER}


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))


@pytest.mark.parametrize("size", [(60_000, 60_000), (9_000, 9_000), (8_096, 8_097)])
def test_bombs_are_refused_by_their_header(size):
    assert reason_of(png_header(*size)) == "decompression_bomb"


def test_the_pixel_limit_is_a_setting(photo):
    assert reason_of(save(photo, "PNG"), max_pixels=151 * 97 - 1) == "decompression_bomb"
    assert decode(save(photo, "PNG"), max_pixels=151 * 97).image.size == (151, 97)
    assert MAX_PIXELS == 8096**2
    assert open_image(save(photo, "PNG")).size == (151, 97)


def test_animations_and_pages_are_refused_but_not_camera_pairs(photo):
    second = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    more = {"save_all": True, "append_images": [second]}
    for format in ("GIF", "WEBP", "PNG"):
        assert reason_of(save(photo, format, **more)) == "animated"
    assert reason_of(save(photo, "TIFF", **more)) == "multipage"
    pair = save(photo, "MPO", quality=98, **more)
    decoded = decode(pair)
    assert decoded.format == "MPO"
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(photo).astype(int)).mean() < 2


def test_pixels_of_unknown_range_are_refused(photo):
    grey = np.asarray(photo.convert("L"))
    assert reason_of(save(Image.fromarray(grey.astype(np.float32)), "TIFF")) == "unsupported_mode"
    assert reason_of(save(Image.fromarray(grey.astype(np.int32)), "TIFF")) == "unsupported_mode"


@pytest.mark.parametrize(
    ("size", "target"), [((151, 97), (64, 64)), ((97, 151), (32, 40)), ((40, 30), (96, 48))]
)
def test_fit_never_distorts(size, target):
    left, top, right, bottom = crop_box(*size, target[0] / target[1])
    assert (right - left) / (bottom - top) == pytest.approx(target[0] / target[1])
    assert left == pytest.approx(size[0] - right)
    assert top == pytest.approx(size[1] - bottom)
    assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])
    # A linear ramp in x and y stays one: its slope tells the scale on both axes.
    y, x = np.mgrid[: size[1], : size[0]]
    ramp = np.dstack([x, y, 0 * x]).astype(np.uint8)
    got = np.asarray(fit(Image.fromarray(ramp), *target)).astype(float)
    scale = (right - left) / target[0]
    assert got.shape == (target[1], target[0], 3)
    inner = got[8:-8, 8:-8]
    assert np.diff(inner[..., 0], axis=1).mean() == pytest.approx(scale, abs=0.1)
    assert np.diff(inner[..., 1], axis=0).mean() == pytest.approx(scale, abs=0.1)
    assert got[target[1] // 2, target[0] // 2, 0] == pytest.approx(size[0] / 2, abs=1.5)


def test_load_pixels_is_exact_at_the_own_size_and_fast_decoding_stays_close(photo, photo_files):
    payload = save(photo, "PNG")
    assert (load_pixels(payload, 151, 97) == np.asarray(photo)).all()
    retina = photo_files["retina.jpg"].read_bytes()  # 1411 x 1411: the JPEG decodes at a lower scale
    for width, height in ((96, 96), (200, 128), (700, 700)):
        full = np.asarray(fit(decode(retina).image, width, height)).astype(int)
        assert np.abs(load_pixels(retina, width, height).astype(int) - full).mean() < 1.0
    sideways = Image.Exif()
    sideways[0x0112] = 6
    turned = save(Image.open(photo_files["retina.jpg"]).crop((0, 200, 1411, 900)), "JPEG", exif=sideways)
    full = np.asarray(fit(decode(turned).image, 64, 120)).astype(int)
    assert np.abs(load_pixels(turned, 64, 120).astype(int) - full).mean() < 1.0
