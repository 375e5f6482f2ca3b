"""Copies across parts: one row stays, with everything the others knew; any window of memory gives the same."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_nucleus.data.curation import duplicates, readers
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.index import INDEX_SCHEMA, QUARANTINE_SCHEMA
from tests.data.curation.helpers import encode, files_of, make_settings, table

STAGES = ["inspect", "exact_duplicates", "near_duplicates"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, photos):
    """Four photographs, each in other bytes of the same pixels, twice in the same bytes, recompressed, and smaller."""
    folder = tmp_path_factory.mktemp("copies") / "in"
    folder.mkdir()
    for number, name in enumerate(("astronaut.png", "coffee.png", "chelsea.png", "china.jpg")):
        image = photos[name].convert("RGB").resize((320, 256))
        small = image.resize((200, 160), Image.Resampling.LANCZOS)
        payloads = {
            f"a{number}.png": (encode(image, compress_level=9), {"caption": f"first {number}"}),
            f"b{number}.png": (
                encode(image, compress_level=1),
                {"caption": f"second {number}", "tier": "A3"},
            ),
            f"c{number}.png": (encode(image, compress_level=1), {"captions": ["a", "b", "c"]}),
            f"d{number}.jpg": (encode(image, "JPEG", quality=75), {"caption": f"fourth {number}"}),
            f"e{number}.png": (encode(small), {"caption": f"fifth {number}", "url": f"u{number}"}),
        }
        if number == 3:  # a known licence goes before resolution
            payloads["e3.png"][1]["license"] = "CC0-1.0"
        for file, (payload, side) in payloads.items():
            (folder / file).write_bytes(payload)
            (folder / f"{file.split('.')[0]}.json").write_text(json.dumps(side))
    return folder


@pytest.fixture(scope="module")
def curated(tmp_path_factory, source):
    output = tmp_path_factory.mktemp("copies_out") / "out"
    return output, curate(source, output, make_settings(STAGES))


def test_one_of_each_stays_with_captions_and_provenance_of_all(curated):
    output, result = curated
    assert result["rejected"] == {"exact_duplicate": 4, "near_duplicate": 8, "pixel_duplicate": 4}
    rows = {r["source_id"]: r for r in table(output / "index", INDEX_SCHEMA)}
    # Of the same pixels the file with the most captions stays; where a licence is known, that file does.
    assert set(rows) == {"c0.png", "c1.png", "c2.png", "e3.png"}
    row = rows["c0.png"]
    assert sorted(c["text"] for c in row["captions"]) == [
        "a",
        "b",
        "c",
        "fifth 0",
        "first 0",
        "fourth 0",
        "second 0",
    ]
    assert row["tier"] == "A3"
    relations = {d["source_id"]: (d["relation"], d["distance"]) for d in row["duplicates"]}
    assert {name: relation for name, (relation, _) in relations.items()} == {
        "a0.png": "pixel_duplicate",
        "b0.png": "exact_duplicate",
        "d0.jpg": "near_duplicate",
        "e0.png": "near_duplicate",
    }
    assert all(0 <= relations[name][1] <= 4 for name in ("d0.jpg", "e0.png"))
    assert relations["a0.png"][1] is None
    assert row["duplicate_cluster"] == row["id"]
    addresses = {d["source_id"]: d["source_url"] for d in row["duplicates"]}
    assert addresses["e0.png"] == "u0"
    # The licensed one stands for the one that stood for its bytes and pixels: nobody is forgotten.
    assert {d["source_id"] for d in rows["e3.png"]["duplicates"]} == {"a3.png", "b3.png", "c3.png", "d3.jpg"}
    assert rows["e3.png"]["licence"] == "CC0-1.0"


def test_every_copy_is_listed_with_what_it_is_a_copy_of(curated):
    output, _ = curated
    dropped = {r["item"]: (r["reason"], r["detail"]) for r in table(output / "quarantine", QUARANTINE_SCHEMA)}
    assert len(dropped) == 16
    by_bytes = [name for name, (reason, _) in dropped.items() if reason == "exact_duplicate"]
    assert len(by_bytes) == 4
    assert {name[0] for name in by_bytes} == {"b"}
    assert dropped["b1.png"][1] == "the same bytes as c1.png"
    assert dropped["d1.jpg"][0] == "near_duplicate"
    assert dropped["d1.jpg"][1].endswith("of 64 bits from c1.png")


@pytest.mark.parametrize("window", [1, 3])
def test_windows_of_any_size_and_parts_of_any_size_give_the_same_rows(
    curated, source, tmp_path, monkeypatch, window
):
    monkeypatch.setattr(readers, "FILES_PER_TASK", 3)
    monkeypatch.setattr(duplicates, "MEMBERS_PER_WINDOW", window)
    curate(source, tmp_path / "out", make_settings(STAGES))
    output, _ = curated
    for name in ("index", "quarantine"):
        (mine,), (whole,) = ((tmp_path / "out" / name).glob("*"), (output / name).glob("*"))
        mine, whole = pq.read_table(mine), pq.read_table(whole)
        assert mine.drop_columns([]).equals(whole), name
    assert files_of(tmp_path / "out" / "shards") == files_of(output / "shards")
    assert not list((tmp_path / "out" / "stages").rglob("copies-*"))  # the stage's own files are gone


def test_pictures_with_equal_keys_and_other_pixels_both_stay(tmp_path, monkeypatch):
    """The key of the reduced picture only proposes; all pixels decide."""
    from megatron_nucleus.data.curation import measures

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    other = noise.copy()
    other[0, 0] ^= 1
    source = tmp_path / "in"
    source.mkdir()
    for name, pixels in (("a", noise), ("b", other), ("c", noise)):
        (source / f"{name}.png").write_bytes(
            encode(Image.fromarray(pixels), compress_level=1 + (name == "c"))
        )
        (source / f"{name}.txt").write_text(name)
    keyed = measures.measure

    def same_key(glances):
        return [m._replace(pixel_key=bytes(16)) for m in keyed(glances)]

    monkeypatch.setattr(measures, "measure", same_key)
    result = curate(source, tmp_path / "out", make_settings(["inspect", "exact_duplicates"]))
    assert (result["kept"], result["rejected"]) == (2, {"pixel_duplicate": 1})
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert {r["source_id"] for r in rows} >= {"b.png"}
