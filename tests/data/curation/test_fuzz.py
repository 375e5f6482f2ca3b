"""Thousands of damaged files: each gives a row or a declared reason, the same every time, and never an exception."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from megatron_nucleus.data.curation.stage import Drop, Row
from megatron_nucleus.data.curation.stages.inspect import InspectConfig, inspect
from megatron_nucleus.data.images import quiet_decoding
from tests.data.curation.one_image import encoded, row_of

SEED = 20260101
MUTANTS_PER_FILE = 80
CONFIG = InspectConfig(min_side_px=8, max_aspect=20, min_jpeg_quality=0, min_webp_quality=0)
MAX_PIXELS = 1 << 20  # a header that promises more is refused before it costs time


@pytest.fixture(scope="module")
def whole_files(photos) -> list[bytes]:
    photo = photos["coffee.png"].convert("RGB").resize((72, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    icc = photos["astronaut.png"].info.get("icc_profile") or b"x" * 128
    files = [
        encoded(photo, "JPEG", quality=85, exif=exif),
        encoded(photo, "JPEG", quality=60, progressive=True, icc_profile=icc),
        encoded(photo.convert("L"), "JPEG", restart_marker_rows=1),
        encoded(photo.convert("CMYK"), "JPEG"),
        encoded(photo, "PNG"),
        encoded(photo.quantize(16), "PNG", transparency=3),
        encoded(photo.convert("LA"), "PNG"),
        encoded(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        encoded(photo, "PNG", save_all=True, append_images=[photo.rotate(90)]),
        encoded(photo, "WEBP", quality=70, exif=exif),
        encoded(photo, "WEBP", lossless=True),
        encoded(
            photo.convert("RGBA"), "WEBP", save_all=True, append_images=[photo.rotate(90).convert("RGBA")]
        ),
        encoded(photo, "GIF"),
        encoded(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]),
        encoded(photo, "BMP"),
        encoded(photo.quantize(16), "BMP"),
        encoded(photo, "TIFF"),
        encoded(photo, "TIFF", compression="tiff_lzw", exif=exif),
        encoded(photo, "TIFF", compression="jpeg"),
        encoded(photo.convert("1"), "TIFF", compression="group4"),
        encoded(photo, "TIFF", save_all=True, append_images=[photo.rotate(90)]),
        encoded(photo, "JPEG2000"),
        encoded(photo, "JPEG2000", no_jp2=True),
        encoded(photo, "PPM"),
        encoded(photo.convert("1"), "PPM"),
        encoded(photo, "MPO", save_all=True, append_images=[photo.rotate(90)]),
    ]
    return files + ([encoded(photo, "AVIF", speed=10)] if features.check("avif") else [])


def mutants(files: list[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Flipped bits, edited headers, truncations, zeroed and doubled pieces, pieces of two files, and noise."""

    def place(data: bytearray, head: bool) -> int:
        return int(rng.integers(0, min(len(data), 160) if head else len(data)))

    for whole in files:
        for turn in range(MUTANTS_PER_FILE):
            data = bytearray(whole)
            kind = turn % 8
            if kind in (0, 1):
                for _ in range(1 << int(rng.integers(0, 6))):
                    data[place(data, kind == 1)] ^= 1 << int(rng.integers(0, 8))
            elif kind == 2:
                for _ in range(int(rng.integers(1, 5))):
                    data[place(data, True)] = int(rng.choice([0, 1, 127, 128, 255]))
            elif kind == 3:
                del data[place(data, False) :]
            elif kind == 4:
                start, end = sorted((place(data, False), place(data, False)))
                data[start:end] = bytes(end - start)
            elif kind == 5:
                start, end = sorted((place(data, False), place(data, False)))
                data[end:end] = data[start:end]
            elif kind == 6:
                other = files[int(rng.integers(0, len(files)))]
                data[place(data, False) :] = other[int(rng.integers(0, len(other))) :]
            else:
                at = place(data, rng.random() < 0.5)
                data[at : at + 24] = rng.bytes(24)
            yield bytes(data)
    for number in range(64):
        yield files[number % len(files)][:16] + rng.bytes(int(rng.integers(0, 3000)))


def judged(rows: list[Row]) -> list[dict | Drop]:
    with quiet_decoding():
        results = inspect.function(rows, CONFIG)
    assert len(results) == len(rows)
    for result in results:
        if isinstance(result, Drop):
            assert inspect.verdict(result.reason) in ("rejected", "quarantined")
            assert 0 < len(result.detail) < 2000
        else:
            assert result.keys() == set(inspect.adds.names)
            assert result["width_px"] * result["height_px"] <= MAX_PIXELS
            measured = [result[k] for k in ("luma_std", "laplacian_variance", "high_frequency_share")]
            assert np.isfinite(measured).all()
    return results


def test_whole_files_are_rows_or_have_the_reason_that_fits(tmp_path, whole_files):
    rows = [
        row_of(tmp_path, f, f"{n}.x", {f"{n}.txt": b"x"}, max_pixels=MAX_PIXELS)
        for n, f in enumerate(whole_files)
    ]
    reasons = Counter(r.reason if isinstance(r, Drop) else "row" for r in judged(rows))
    assert reasons == {"row": len(whole_files) - 4, "animated": 3, "multipage": 1}


def test_thousands_of_damaged_files_give_rows_or_reasons_and_the_same_again(tmp_path, whole_files):
    rng = np.random.default_rng(SEED)
    damaged = list(mutants(whole_files, rng))
    assert len(damaged) >= 2000
    seen: Counter[str] = Counter()
    for start in range(0, len(damaged), inspect.batch_rows):
        batch = damaged[start : start + inspect.batch_rows]
        rows = [
            row_of(tmp_path, f, f"{n}.x", {f"{n}.txt": b"x"}, max_pixels=MAX_PIXELS)
            for n, f in enumerate(batch)
        ]
        first = judged(rows)
        seen.update(r.reason if isinstance(r, Drop) else "row" for r in first)
        if start % (8 * inspect.batch_rows) == 0:
            again = [Row(dict(row), row._source) for row in rows]
            assert judged(again) == first
    assert {
        "row",
        "undecodable",
        "not_an_image",
        "empty_file",
        "decompression_bomb",
        "animated",
    } <= seen.keys() | {"empty_file"}
    assert 0.1 < seen["row"] / len(damaged) < 0.8


def test_damaged_captions_and_table_rows_give_rows_or_reasons(tmp_path, photos):
    picture = encoded(photos["coffee.png"].convert("RGB").resize((72, 48)), "PNG")
    given = json.dumps(
        {"captions": ["a cup", {"text": "of coffee", "alignment": 0.7}], "licence": "CC0", "tier": "A1"}
    )
    rng = np.random.default_rng(SEED + 1)
    seen: Counter[str] = Counter()
    for number in range(300):
        texts = {".json": bytearray(given.encode()), ".txt": bytearray("ein schöner Morgen\n".encode())}
        for content in texts.values():
            for _ in range(int(rng.integers(0, 3))):
                content[int(rng.integers(0, len(content)))] = int(rng.integers(0, 256))
        row_text = texts[".json"].decode("latin-1") if number % 3 == 0 else None
        sidecars = {f"p{suffix}": bytes(content) for suffix, content in texts.items()}
        (result,) = judged([row_of(tmp_path, picture, "p.png", sidecars, given=row_text)])
        seen[result.reason if isinstance(result, Drop) else "row"] += 1
    assert {"row", "bad_caption"} <= seen.keys() <= {"row", "bad_caption", "bad_tier"}
