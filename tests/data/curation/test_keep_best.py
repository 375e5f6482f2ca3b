"""Of copies of real photographs the better file stays; a score decides only where it is asked for."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFilter

from megatron_nucleus.data.curation import colour, duplicates, picture_tasks
from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.data.curation.stages import near_duplicates as near
from megatron_nucleus.data.index import INDEX_SCHEMA, QUARANTINE_SCHEMA, SCORE_TYPE
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.helpers import encode, make_settings, table, write_captioned

STAGES = ["inspect", "exact_duplicates", "near_duplicates"]
COLOURED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "china.jpg", "flower.jpg")
SCORER = '''
import numpy as np
from megatron_nucleus.data.curation.scorers.protocol import Scored

class White:
    """Share of white pixels: a stand-in for a judge of watermarks, where more is worse."""

    name, revision, side_px = "white", "1", 256

    def __init__(self, config):
        pass

    def score(self, pictures, captions):
        return [Scored(float((np.asarray(p.convert("L")) > 250).mean())) for p in pictures]
'''


def kept(folder, files: dict[str, bytes], stages=STAGES, **knobs) -> set[str]:
    """Names of the files that stay."""
    write_captioned(folder / "in", files)
    curate(folder / "in", folder / "out", make_settings(stages, **knobs))
    return {row["source_id"] for row in table(folder / "out" / "index", INDEX_SCHEMA)}


def small(photo: Image.Image) -> Image.Image:
    return photo.convert("RGB").resize((384, 288))


def test_the_better_file_stays_of_every_photograph(tmp_path, photos):
    files, want = {}, set()
    for n, name in enumerate(COLOURED):
        photo = small(photos[name])
        grey = photo.convert("L")
        copies = {
            f"{n}_95.jpg": encode(photo, "JPEG", quality=95),
            f"{n}_25.jpg": encode(photo, "JPEG", quality=25),
            f"{n}_grey_95.jpg": encode(grey, "JPEG", quality=95),
            f"{n}_grey_as_colour_99.jpg": encode(grey.convert("RGB"), "JPEG", quality=99),
            f"{n}_grey.png": encode(grey.convert("RGB")),
        }
        files |= copies
        want.add(f"{n}_95.jpg")
    assert kept(tmp_path, files) == want
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert {len(row["captions"]) for row in rows} == {5}
    assert {d["relation"] for row in rows for d in row["duplicates"]} == {"near_duplicate"}


def test_a_copy_that_was_coded_badly_and_saved_again_is_known_by_its_bytes(tmp_path, photos):
    files = {}
    for n, name in enumerate(COLOURED):
        photo = small(photos[name])
        files[f"{n}_original.jpg"] = encode(photo, "JPEG", quality=90)
        bad = Image.open(io.BytesIO(encode(photo, "JPEG", quality=25)))
        files[f"{n}_again.jpg"] = encode(bad, "JPEG", quality=95)
    assert kept(tmp_path, files) == {f"{n}_original.jpg" for n in range(len(COLOURED))}


@pytest.mark.parametrize(
    ("best", "worse"),
    [
        (("png", "PNG", {}), ("jpg", "JPEG", {"quality": 99})),
        (("webp", "WEBP", {"lossless": True}), ("jpg", "JPEG", {"quality": 99})),
        (("jpg", "JPEG", {"quality": 90}), ("gif", "GIF", {})),
        (("webp", "WEBP", {"quality": 90}), ("jpg", "JPEG", {"quality": 40})),
        (("jpg", "JPEG", {"quality": 90, "subsampling": 0}), ("jpg", "JPEG", {"quality": 90, "subsampling": 2})),
    ],
    ids=lambda coding: f"{coding[1]} {coding[2]}",
)  # fmt: skip
def test_codings_in_their_order(tmp_path, photos, best, worse):
    files, want = {}, set()
    for n, name in enumerate(("astronaut.png", "coffee.png", "china.jpg")):
        for kind, (extension, format, options) in (("best", best), ("worse", worse)):
            files[f"{n}_{kind}.{extension}"] = encode(small(photos[name]), format, **options)
        want.add(f"{n}_best.{best[0]}")
    assert kept(tmp_path, files) == want


def test_of_lossless_files_the_sharper_one_stays(tmp_path, photos):
    files = {}
    for n, name in enumerate(("astronaut.png", "coffee.png", "china.jpg")):
        files[f"{n}_blurred.png"] = encode(small(photos[name]).filter(ImageFilter.GaussianBlur(1)))
        files[f"{n}_sharp.png"] = encode(small(photos[name]), compress_level=9)  # fewer bytes or more
    assert kept(tmp_path, files) == {f"{n}_sharp.png" for n in range(3)}


@pytest.fixture
def marked(tmp_path, photos):
    """(files, scorer): photographs at quality 80, and with a white mark at quality 95."""
    (tmp_path / "white.py").write_text(SCORER)
    files = {}
    for n, name in enumerate(("astronaut.png", "chelsea.png", "china.jpg")):
        photo = small(photos[name])
        files[f"{n}_plain.jpg"] = encode(photo, "JPEG", quality=80)
        ImageDraw.Draw(photo).rectangle((4, 4, 40, 8), fill="white")
        files[f"{n}_marked.jpg"] = encode(photo, "JPEG", quality=95)
    score = {"score": {"as": "white", "kind": f"{tmp_path}/white.py:White", "drop": False}}
    return files, ["inspect", score, "near_duplicates"]


@pytest.mark.parametrize(
    ("knobs", "stays"),
    [
        ({}, "marked"),  # a score that stands before it says nothing unless it is named
        ({"keep_scorer": "white"}, "marked"),
        ({"keep_scorer": "white", "keep_scorer_best": "lowest"}, "plain"),
    ],
)
def test_a_score_decides_only_where_it_is_named(tmp_path, marked, knobs, stays):
    files, stages = marked
    assert kept(tmp_path, files, stages, **knobs) == {f"{n}_{stays}.jpg" for n in range(3)}


def test_a_score_that_is_not_there_is_refused_before_anything_runs(tmp_path, marked):
    files, stages = marked
    with pytest.raises(
        ConfigError, match="keep_scorer beauty: no stage before it writes a score of that name"
    ):
        kept(tmp_path, files, stages, keep_scorer="beauty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keep_scorer": " "}, "keep_scorer is empty"),
        ({"keep_scorer_best": "lowest"}, "does nothing without"),
    ],
)
def test_settings_of_the_score(knobs, message):
    with pytest.raises(ConfigError, match=message):
        near.NearDuplicatesConfig(**knobs)


def test_scores_of_rows():
    """The last of a name counts; a row without is NaN; a name that no row has is refused with those there are."""

    def entry(scorer, value):
        return {"scorer": scorer, "revision": "1", "value": value}

    rows = [[entry("a", 1), entry("b", 2), entry("a", 3)], None, [entry("b", 4)], [], [entry("a", -5)]]
    column = pa.chunked_array([pa.array(rows, pa.list_(SCORE_TYPE))])
    np.testing.assert_array_equal(duplicates._scores(column, "a"), [3, np.nan, np.nan, np.nan, -5])
    with pytest.raises(ConfigError, match=r"keep_scorer c: no copy has .*there is: a, b"):
        duplicates._scores(column, "c")


def test_colour_spread(photos):
    for name in COLOURED:
        photo = photos[name].convert("RGB")
        assert colour.colour_spread(photo) > 3 * colour.MIN_COLOUR_SPREAD, name
        grey = photo.convert("L").convert("RGB")
        assert colour.colour_spread(grey) == 0
        again = Image.open(io.BytesIO(encode(grey, "JPEG", quality=30))).convert("RGB")
        assert colour.colour_spread(again) < colour.MIN_COLOUR_SPREAD / 2
    assert colour.colour_spread(Image.new("RGB", (90, 80), "navy")) == 0  # one colour has no spread


def test_only_ties_are_decoded(tmp_path, photos, monkeypatch):
    """Copies of another size or licence need no look at their colours."""
    looked = []
    plain = near.in_colour
    monkeypatch.setattr(
        near, "in_colour", lambda corpus, rows: looked.append(len(rows)) or plain(corpus, rows)
    )
    photo, other = small(photos["coffee.png"]), small(photos["china.jpg"])
    files = {
        "large.png": encode(photo),
        "less.png": encode(photo.resize((320, 240))),
        "alone.png": encode(small(photos["chelsea.png"])),
        "a.png": encode(other),
        "b.jpg": encode(other, "JPEG", quality=90),
    }
    assert kept(tmp_path, files) == {"large.png", "alone.png", "a.png"}
    assert looked == [2]


def test_a_picture_that_can_no_longer_be_decoded_counts_as_grey(tmp_path, photos):
    good = encode(small(photos["coffee.png"]), "JPEG")
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[:2000])
    references = tuple(
        {"item": name, "container": name.encode(), "offset": None, "length": None}
        for name in ("good.jpg", "cut.jpg", "gone.jpg")
    )
    task = picture_tasks.PictureTask(PayloadSource(str(tmp_path), 1 << 26, 1 << 26), references)
    assert colour.look_for_colour(task) == [True, False, False]


class DyingCorpus:
    """A corpus whose workers die of references with "die" in their name."""

    source = None

    def gather(self, rows, columns):
        assert "item" in columns
        return pa.table({"item": ["die" if row % 2 else "live" for row in rows.tolist()]})

    def map(self, function, tasks, lost_too=False):
        assert lost_too
        for task in tasks:
            died = any("die" in reference["item"] for reference in task.references)
            yield WorkerDied("killed") if died else function(task)


def test_a_picture_that_ends_its_process_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(picture_tasks, "PICTURES_PER_TASK", 3)
    names = ["a", "b", "c", "d", "die 1", "e", "f", "g", "h", "die 2"]
    found = picture_tasks.map_pictures(
        DyingCorpus(), lambda task: [r["item"].upper() for r in task.references], [{"item": n} for n in names]
    )
    assert [isinstance(one, WorkerDied) for one in found] == ["die" in name for name in names]
    assert [one for one in found if isinstance(one, str)] == ["A", "B", "C", "D", "E", "F", "G", "H"]


def test_what_was_not_kept_is_listed_with_hash_and_size(tmp_path, photos):
    photo = small(photos["coffee.png"])
    files = {
        "good.png": encode(photo),
        "tiny.png": encode(photo.resize((70, 50))),
        "cut.jpg": encode(photo, "JPEG")[:-300],
        "page.jpg": b"<html>",
    }
    assert kept(tmp_path, files) == {"good.png"}
    rows = {row["item"]: row for row in table(tmp_path / "out" / "quarantine", QUARANTINE_SCHEMA)}
    assert {name: (row["reason"], row["width_px"], row["height_px"]) for name, row in rows.items()} == {
        "tiny.png": ("too_small", 70, 50),
        "cut.jpg": ("undecodable", 384, 288),
        "page.jpg": ("not_an_image", None, None),
    }
    assert all(row["sha256"] == hashlib.sha256(files[name]).hexdigest() for name, row in rows.items())


def test_a_picture_that_ends_its_process_counts_as_grey(monkeypatch):
    monkeypatch.setattr(colour, "look_for_colour", lambda task: [True for _ in task.references])
    assert colour.in_colour(DyingCorpus(), np.array([2, 5, 6, 8, 9])).tolist() == [
        True,
        False,
        True,
        True,
        False,
    ]
