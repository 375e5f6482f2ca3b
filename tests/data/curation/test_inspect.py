"""The first stage: each reason where it belongs, the cheap ones first, and rows that say what the image is."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageCms, features

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import bench, measures
from megatron_nucleus.data.curation.stage import Drop
from megatron_nucleus.data.curation.stages.inspect import InspectConfig, inspect
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.one_image import encoded, row_of

TEXT = {"picture.txt": b"a cat"}


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    return photos["coffee.png"].convert("RGB")  # 600 x 400


def one(folder: Path, payload: bytes, config: InspectConfig | None = None, **options) -> dict | Drop:
    options.setdefault("sidecars", TEXT)
    (result,) = inspect.function([row_of(folder, payload, **options)], config or InspectConfig())
    if isinstance(result, Drop):
        inspect.verdict(result.reason)  # declared
    else:
        pa.table(
            {k: pa.array([v], inspect.adds.field(k).type) for k, v in result.items()}, schema=inspect.adds
        )
    return result


def reason(*args, **options) -> str | None:
    result = one(*args, **options)
    return result.reason if isinstance(result, Drop) else None


def test_a_row_says_what_the_image_is(tmp_path, photo):
    payload = encoded(photo, "JPEG", quality=90)
    beside = {
        "caption": "a cup",
        "license": "CC0",
        "url": "https://x/1",
        "author": "A",
        "tier": "A2",
        "camera": 7,
    }
    sidecars = {"picture.json": json.dumps(beside).encode(), "picture.txt": b" a  cup of coffee\n"}
    got = one(tmp_path, payload, sidecars=sidecars)
    assert got.keys() == set(inspect.adds.names)
    assert got["id"] == hashlib.sha256(payload).hexdigest()
    facts = ("extension", "width_px", "height_px", "exif_orientation", "licence", "source_url", "attribution", "tier",
             "episode_bucket", "metadata", "notes")  # fmt: skip
    want = ("jpg", 600, 400, 1, "CC0", "https://x/1", "A", "A2", None, '{"camera": 7}', [])
    assert tuple(got[name] for name in facts) == want
    assert [c["text"] for c in got["captions"]] == ["a cup", "a cup of coffee"]
    header = images.open_image(payload)
    luma = images.decode_opened(header, measures.draft_size((600, 400)), grey=True).image
    assert {k: got[k] for k in measures.COLUMNS} == measures.measure([measures.look(luma, (600, 400))])[
        0
    ]._asdict()


def test_a_row_of_a_table_counts_like_a_json_file(tmp_path, photo):
    given = json.dumps(
        {"captions": ["one", "two"], "licence": "MIT", "episode_bucket": "B3", "shot": "close"}
    )
    got = one(tmp_path, encoded(photo, "PNG"), name="p.png", sidecars=None, given=given)
    assert [c["text"] for c in got["captions"]] == ["one", "two"]
    assert (got["licence"], got["episode_bucket"], got["metadata"]) == ("MIT", "B3", '{"shot": "close"}')
    assert reason(tmp_path, encoded(photo, "PNG"), sidecars=None, given="{") == "bad_caption"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_as_displayed_and_the_measures_are_of_the_upright_picture(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = one(tmp_path, encoded(photo, "JPEG", quality=95, exif=exif))
    assert (got["width_px"], got["height_px"]) == ((600, 400) if orientation < 5 else (400, 600))
    assert got["exif_orientation"] == orientation
    assert got["notes"] == (["exif_rotated"] if orientation > 1 else [])
    upright = images.decode(encoded(photo, "JPEG", quality=95, exif=exif)).image
    plain = measures.measure([measures.look(upright.convert("L"), upright.size)])[0]
    assert (got["phash"] ^ plain.phash).bit_count() <= 2


def test_notes(tmp_path, photo):
    odd = encoded(photo, "PNG", icc_profile=b"not a profile")
    assert one(tmp_path, odd, name="x.png")["notes"] == ["icc_ignored"]
    assert one(tmp_path, encoded(photo, "JPEG", icc_profile=b"not a profile"))["notes"] == ["icc_ignored"]
    assert one(tmp_path, encoded(photo, "PNG"), name="x.jpg")["notes"] == ["extension_mismatch"]
    bad_and_good = {"picture.txt": b"caf\xe9", "picture.json": b'["coffee"]'}
    assert one(tmp_path, encoded(photo, "PNG"), name="x.png", sidecars=bad_and_good)["notes"] == [
        "caption_dropped"
    ]


def test_limits_of_size_and_aspect(tmp_path, photo):
    def png(width: int, height: int) -> bytes:
        return encoded(photo.resize((width, height)), "PNG")

    tight = InspectConfig(max_side_px=700)
    assert reason(tmp_path, png(255, 300)) == "too_small"
    assert reason(tmp_path, png(256, 256)) is None
    assert reason(tmp_path, png(701, 300), tight) == "too_large"
    assert reason(tmp_path, png(700, 300), tight) is None
    assert reason(tmp_path, png(300, 901)) == "extreme_aspect"
    assert reason(tmp_path, png(300, 900)) is None
    assert "256" in one(tmp_path, png(255, 300)).detail


def test_limits_of_files(tmp_path, photo):
    payload = encoded(photo, "PNG")
    assert reason(tmp_path, payload, max_file_bytes=len(payload) - 1) == "file_too_large"
    assert inspect.verdict("file_too_large") == "rejected"
    assert reason(tmp_path, payload, max_pixels=600 * 400 - 1) == "decompression_bomb"
    assert reason(tmp_path, payload, problem={"reason": "missing_file", "detail": "x"}) == "missing_file"
    row = row_of(tmp_path, payload, sidecars=TEXT)
    (tmp_path / "picture.jpg").unlink()
    (gone,) = inspect.function([row], InspectConfig())
    assert gone.reason in ("unreadable", "missing_file")


def test_over_compression(tmp_path, photo):
    config = InspectConfig()
    assert reason(tmp_path, encoded(photo, "JPEG", quality=12), config) == "over_compressed"
    assert reason(tmp_path, encoded(photo, "JPEG", quality=30), config) is None
    assert reason(tmp_path, encoded(photo, "WEBP", quality=1), config) == "over_compressed"
    assert reason(tmp_path, encoded(photo, "WEBP", quality=30), config) is None
    assert reason(tmp_path, encoded(photo, "JPEG", quality=1), InspectConfig(min_jpeg_quality=0)) is None
    flat = Image.new("RGB", (2000, 1500), "white")
    flat.paste((200, 20, 20), (300, 300, 1200, 900))
    assert reason(tmp_path, encoded(flat, "JPEG", quality=85), config) is None  # 0.2 bits per pixel


def test_cheap_checks_come_first(tmp_path, photo):
    """A file with every fault is dropped for the cheapest; mended one by one, for the next."""
    bad = {"picture.txt": b"\xff"}
    small, large = photo.resize((100, 90)), photo

    def cut(payload: bytes) -> bytes:
        return payload[:-40]

    blocky, good = encoded(small, "JPEG", quality=3), encoded(large, "JPEG", quality=3)
    order = [
        reason(tmp_path, cut(blocky), sidecars=bad, problem={"reason": "unsafe_path", "detail": ""}),
        reason(tmp_path, b"", sidecars=bad),
        reason(tmp_path, b"<html>" + blocky, sidecars=bad),
        reason(tmp_path, cut(blocky), sidecars=bad),
        reason(tmp_path, cut(good), sidecars=bad),
        reason(tmp_path, cut(encoded(large, "JPEG")), sidecars=bad),
        reason(tmp_path, cut(encoded(large, "JPEG"))),
        reason(tmp_path, encoded(large, "JPEG")),
    ]
    assert order == ["unsafe_path", "empty_file", "not_an_image", "too_small", "over_compressed", "bad_caption",
                     "undecodable", None]  # fmt: skip


def test_captions(tmp_path, photo):
    payload = encoded(photo, "PNG")

    def judged(**sidecars: bytes) -> str | None:
        return reason(tmp_path, payload, sidecars={f"picture.{k}": v for k, v in sidecars.items()})

    assert reason(tmp_path, payload, sidecars=None) == "missing_caption"
    assert judged(txt=b"  \n ") == "missing_caption"
    assert judged(txt=b"a" * 100_000) == "bad_caption"
    assert judged(txt=b"a" * (2 << 20)) == "bad_caption"  # more than a caption file may have
    assert judged(txt="grün".encode("latin-1")) == "bad_caption"
    assert judged(txt="grün".encode("utf-16")) == "bad_caption"
    assert judged(txt=b"a \x07 bell") == "bad_caption"
    assert judged(txt="a \x85 line".encode()) is None  # C1's NEL is white space
    assert judged(json=b'{"caption": "x", "tier": "A9"}') == "bad_tier"
    control = one(tmp_path, payload, sidecars={"picture.txt": b"tea \x1b[31m"})
    assert "U+001B" in control.detail
    assert re.search(r"\b4\b", control.detail)


def test_captions_that_a_later_stage_writes(tmp_path, photo):
    free = InspectConfig(require_captions=False)
    got = one(tmp_path, encoded(photo, "PNG"), free, sidecars={"picture.json": b'{"licence": "CC0"}'})
    assert (got["captions"], got["licence"]) == ([], "CC0")
    assert one(tmp_path, encoded(photo, "PNG"), free, sidecars=None)["captions"] == []


def test_bad_input_has_a_reason_each_and_odd_input_a_row(tmp_path, photo):
    grey16 = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    real32 = Image.fromarray(np.asarray(photo.convert("L")).astype(np.float32))
    frames = {"save_all": True, "append_images": [photo.transpose(Image.Transpose.ROTATE_180)]}
    cases = {
        "undecodable": encoded(photo, "PNG")[:-2000],
        "empty_file": b"",
        "not_an_image": b"GIF8 is not it" * 99,
        "unsupported_format": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "animated": encoded(photo, "WEBP", **frames),
        "multipage": encoded(photo, "TIFF", **frames),
        "unsupported_mode": encoded(real32, "TIFF"),
    }
    assert {want: reason(tmp_path, payload) for want, payload in cases.items()} == {
        want: want for want in cases
    }
    cmyk = one(tmp_path, encoded(photo.convert("CMYK"), "JPEG", quality=95))
    deep = one(tmp_path, encoded(grey16, "PNG"), name="p.png")
    plain = one(tmp_path, encoded(photo, "PNG"), name="p.png")
    for row in (cmyk, deep):
        assert (row["width_px"], row["height_px"]) == (600, 400)
        assert (row["phash"] ^ plain["phash"]).bit_count() <= 4
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert one(tmp_path, encoded(photo, "JPEG", icc_profile=wide))["notes"] == ["icc_ignored"]


def test_results_do_not_depend_on_the_batch(tmp_path, photo, photos):
    pictures = [
        photo,
        photos["retina.jpg"].convert("RGB"),
        Image.new("RGB", (300, 300), "navy"),
        photo.convert("L"),
    ]
    rows = [
        row_of(tmp_path, encoded(picture, format), f"{n}.{format}", {f"{n}.{format}.txt": b"x"})
        for n, (picture, format) in enumerate((p, f) for p in pictures for f in ("JPEG", "PNG"))
    ]
    rows.insert(3, row_of(tmp_path, b"", "empty.jpg"))
    together = inspect.function(rows, InspectConfig())
    alone = [inspect.function([row], InspectConfig())[0] for row in rows]
    assert together == alone
    assert inspect.function(rows[::-1], InspectConfig()) == alone[::-1]
    assert [isinstance(r, Drop) for r in together] == [n == 3 for n in range(9)]


def test_colour_is_measured_where_it_may_decide(tmp_path, photo):
    navy = Image.new("RGB", (1000, 600), (0, 0, 90))
    for payload in (encoded(navy, "PNG"), encoded(navy, "JPEG", quality=95)):
        got = one(tmp_path, payload)
        assert got["dominant_colour_share"] == 1
        assert got["chroma_std"] < 1
    assert one(tmp_path, encoded(photo, "PNG"))["chroma_std"] is None


def test_a_dropped_image_keeps_its_hash_and_the_size_that_its_header_says(tmp_path, photo):
    turned = Image.Exif()
    turned[0x0112] = 6
    captioned = {"min_side_px": 256}
    cases = {
        "too_small": (encoded(photo.resize((200, 300)), "PNG"), captioned, (200, 300)),
        "too_large": (encoded(photo, "JPEG", exif=turned), {"max_side_px": 500}, (400, 600)),
        "extreme_aspect": (encoded(photo, "WEBP", exif=turned), {"max_aspect": 1.2}, (400, 600)),
        "over_compressed": (encoded(photo, "JPEG", quality=3), captioned, (600, 400)),
        "undecodable": (encoded(photo, "JPEG", exif=turned)[:-500], captioned, (400, 600)),
        "animated": (encoded(photo, "GIF", save_all=True, append_images=[photo.rotate(180)]), captioned, (600, 400)),
        "not_an_image": (b"<html>", captioned, (None, None)),
        "empty_file": (b"", captioned, (None, None)),
    }  # fmt: skip
    for want, (payload, knobs, size) in cases.items():
        got = one(tmp_path, payload, InspectConfig(**knobs))
        assert got.reason == want
        assert got.id == hashlib.sha256(payload).hexdigest()
        assert (got.width_px, got.height_px) == size, want
    got = one(tmp_path, encoded(photo, "JPEG"), sidecars=None)
    assert (got.reason, got.width_px, got.height_px) == ("missing_caption", 600, 400)
    assert one(tmp_path, b"", problem={"reason": "missing_file", "detail": "x"}) == Drop("missing_file", "x")
    unread = one(tmp_path, encoded(photo, "PNG"), max_file_bytes=10)
    assert (unread.reason, unread.id) == ("file_too_large", None)


def test_damage_in_the_colours_alone_keeps_hash_and_size(tmp_path, monkeypatch):
    def damaged(row):
        raise images.UnusableImage("undecodable", "in the colours")

    module = importlib.import_module(inspect.function.__module__)
    monkeypatch.setattr(module, "_colours", damaged)
    payload = encoded(Image.new("RGB", (300, 280), "navy"), "PNG")
    assert one(tmp_path, payload) == Drop(
        "undecodable", "in the colours", hashlib.sha256(payload).hexdigest(), 300, 280
    )


def test_the_quality_of_the_coding(tmp_path, photo):
    def quality(picture: Image.Image, format: str, **options) -> float | None:
        return one(tmp_path, encoded(picture, format, **options))["coding_quality"]

    assert quality(photo, "JPEG", quality=95) == pytest.approx(95, abs=0.5)
    assert quality(photo, "JPEG", quality=25) == pytest.approx(25, abs=0.5)
    assert quality(photo, "WEBP", quality=80) == pytest.approx(80, abs=3)
    for format, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("BMP", {}),
        ("PPM", {}),
    ):
        assert quality(photo, format, **options) == 100, format
    assert quality(photo, "TIFF", compression="jpeg") is None
    for picture, format in ((photo.quantize(64), "PNG"), (photo, "GIF"), (photo.convert("1"), "PNG")):
        assert quality(picture, format) is None, format


def outcome(payload: bytes, draft_px: tuple[int, int] | None, grey: bool) -> str:
    try:
        images.decode(payload, draft_px=draft_px) if not grey else images.decode_opened(
            images.open_image(payload), draft_px, grey=True
        )
    except images.UnusableImage as problem:
        return problem.reason
    return "whole"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}], ids=str
)
def test_a_jpeg_decoded_small_or_grey_fails_exactly_where_a_full_decode_does(photo, options):
    """libjpeg reads all coefficients in any case, so every cut and truncation has the same outcome in all ways."""
    payload = encoded(photo, "JPEG", quality=80, **options)
    rng = np.random.default_rng(0)
    ends = [*range(1, 12), *rng.integers(12, len(payload), 60)]
    damaged = [payload[: len(payload) - int(n)] for n in ends]
    for _ in range(30):  # a piece from the middle is missing
        start, end = sorted(rng.integers(700, len(payload), 2))
        damaged.append(payload[:start] + payload[end:])
    seen = set()
    for data in damaged:
        full = outcome(data, None, False)
        seen.add(full)
        for draft_px in ((600, 400), (300, 200), (150, 100), (75, 50)):
            assert outcome(data, draft_px, False) == full
            assert outcome(data, draft_px, True) == full
    assert "undecodable" in seen
    assert {outcome(data, (75, 50), True) for data in damaged[2:71]} == {
        "undecodable"
    }  # all that are truncated


def test_grey_decoding_gives_the_luminance_of_the_colours(photos):
    picture = photos["china.jpg"].convert("RGB")
    for options in ({}, {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}):
        payload = encoded(picture, "JPEG", quality=95, subsampling=0, **options)
        grey = images.decode_opened(images.open_image(payload), grey=True)
        assert grey.image.mode == "L"
        want = np.asarray(images.decode(payload).image.convert("L")).astype(int)
        error = np.abs(np.asarray(grey.image).astype(int) - want)
        assert np.quantile(error, 0.99) <= 1  # more only where a colour was outside RGB
        assert error.max() <= 8
    for format in ("PNG", "WEBP") + (("AVIF",) if features.check("avif") else ()):
        payload = encoded(picture, format)
        grey = images.decode_opened(images.open_image(payload), grey=True).image
        assert (np.asarray(grey) == np.asarray(images.decode(payload).image.convert("L"))).all()


def test_unusable_reasons_are_those_that_the_module_raises():
    source = Path(images.__file__).read_text()
    raised = set(re.findall(r'UnusableImage\(\s*"(\w+)"', source)) | set(
        re.findall(r'kind = "(\w+)" if .* else "(\w+)"', source)[0]
    )
    assert raised == images.UNUSABLE_REASONS


@pytest.mark.parametrize(
    ("knobs", "named"),
    [({"min_side_px": 0}, "min_side_px"), ({"max_side_px": 200}, "max_side_px"), ({"max_aspect": 0.5}, "max_aspect"),
     ({"max_aspect": float("nan")}, "max_aspect"), ({"min_jpeg_quality": 101}, "min_jpeg_quality"),
     ({"min_webp_quality": -1}, "min_webp_quality")],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(knobs, named):
    with pytest.raises(ConfigError, match=named):
        InspectConfig(**knobs)


def test_the_benchmark_runs_both_loops_and_refuses_what_it_cannot_compare(photo):
    files = [encoded(photo.resize((1200, 800)), "JPEG", quality=q) for q in (80, 90)]
    got = bench.inspect_ratio(files, rounds=1)
    assert got["files"] == 2
    assert got["mean_bytes"] == sum(map(len, files)) / 2
    assert got["ratio"] > 0.3
    for wrong, text in (([], "no files"), ([files[0], encoded(photo, "PNG")], "file 1"), ([b"x"], "file 0")):
        with pytest.raises(ConfigError, match=text):
            bench.inspect_ratio(wrong, rounds=1)


def test_original_bytes_are_not_kept_open(tmp_path, photo):
    """A picture of the input may be replaced or removed after the stage has run (on systems that lock open files)."""
    row = row_of(tmp_path, encoded(photo, "JPEG"), sidecars=TEXT)
    (found,) = inspect.function([row], InspectConfig())
    assert found["id"] == hashlib.sha256((tmp_path / "picture.jpg").read_bytes()).hexdigest()
    assert not any(isinstance(value, Image.Image | io.BytesIO) for value in found.values())
