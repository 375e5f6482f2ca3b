"""A folder of real photographs in every odd form, and what curation makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_nucleus.data.curation.pipeline import curate
from tests.data.curation.helpers import encode, make_settings

ODD_SETTINGS = {"max_shard_bytes": 200_000}


@pytest.fixture(scope="session")
def odd_files(photos):
    """name -> (bytes, expected verdict: ``kept`` or a reason)."""
    cat = photos["chelsea.png"].convert("RGB")  # 451 x 300
    grey = photos["camera.png"].resize((200, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(photos["astronaut.png"].convert("RGB"), "JPEG")
    wide = cat.resize((640, 70))
    see_through = cat.convert("RGBA")
    see_through.putalpha(200)
    frames = {"save_all": True, "append_images": [ImageOps.mirror(cat)]}
    return {
        "plain.jpg": (jpeg, "kept"),
        "odd_size.png": (encode(cat.resize((333, 187))), "kept"),
        "portrait.png": (encode(cat.rotate(90, expand=True)), "kept"),
        "cmyk.jpg": (encode(cat.convert("CMYK"), "JPEG"), "kept"),
        "palette.png": (encode(cat.quantize(32)), "kept"),
        "grey.png": (encode(grey), "kept"),
        "sixteen_bit.png": (encode(Image.fromarray((255 - np.asarray(grey)).astype(np.uint16) * 257)), "kept"),
        "alpha.png": (encode(see_through), "kept"),
        "one_bit.tif": (encode(cat.convert("1"), "TIFF"), "kept"),
        "rotated.jpg": (encode(cat, "JPEG", exif=exif), "kept"),
        "modern.webp": (encode(cat, "WEBP"), "kept"),
        "still.gif": (encode(cat, "GIF"), "kept"),
        "really_a_jpeg.png": (encode(cat, "JPEG", quality=50), "kept"),
        "no_extension": (encode(cat, "JPEG", quality=40), "kept"),
        "animated.gif": (encode(cat, "GIF", **frames), "animated"),
        "animated.webp": (encode(cat, "WEBP", **frames), "animated"),
        "pages.tif": (encode(cat, "TIFF", **frames), "multipage"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "undecodable"),
        "truncated.png": (encode(cat)[:5000], "undecodable"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "zero.jpg": (b"", "empty_file"),
        "floating.tif": (encode(Image.fromarray(np.zeros((99, 99), np.float32)), "TIFF"), "unsupported_mode"),
        "bomb.png": (encode(Image.new("1", (12_000, 12_000))), "decompression_bomb"),
        "tiny.png": (encode(cat.resize((63, 200))), "too_small"),
        "huge.png": (encode(Image.new("1", (8_200, 4_000))), "too_large"),
        "panorama.png": (encode(wide), "extreme_aspect"),
        "copy_of_plain.jpg": (jpeg, "exact_duplicate"),
        "uncaptioned.png": (encode(cat.resize((100, 101))), "missing_caption"),
        "broken_json.png": (encode(cat.resize((101, 101))), "bad_caption"),
    }  # fmt: skip


def write_folder(folder, odd_files):
    folder.mkdir()
    for name, (payload, _) in odd_files.items():
        (folder / name).write_bytes(payload)
        stem = name.rsplit(".", 1)[0] if "." in name else name
        if name == "broken_json.png":
            (folder / f"{stem}.json").write_text("{")
        elif name == "animated.webp":
            continue  # shares animated.txt
        elif name != "uncaptioned.png":
            (folder / f"{stem}.txt").write_text(f"a picture called {stem}")
    return folder


@pytest.fixture(scope="session")
def curated(tmp_path_factory, odd_files):
    root = tmp_path_factory.mktemp("curated")
    source = write_folder(root / "in", odd_files)
    return source, root / "out", curate(source, root / "out", make_settings(**ODD_SETTINGS))
