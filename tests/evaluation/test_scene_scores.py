"""The scorer is right about true pictures, refuses false captions, and never fails on anything else."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from megatron_nucleus.data import scenes
from megatron_nucleus.data.encoders.dct import DctCodec
from megatron_nucleus.data.scenes import SceneConfig
from megatron_nucleus.data.scenes.world import RELATIONS, Scene, Thing
from megatron_nucleus.evaluation import scenes as scoring
from megatron_nucleus.evaluation.detector import Detection, detect
from megatron_nucleus.utils.errors import ConfigError, DataError

CONFIGS = {
    "grid 32": SceneConfig(),
    "free 32": SceneConfig(tier="free", scene_sizes=("32x32",)),
    "free 48-128": SceneConfig(tier="free", scene_sizes=("64x64", "48x80", "80x48", "128x96"), max_objects=6),
}
SPOILERS = {
    "untouched": lambda pixels, i: pixels,
    "blurred": lambda pixels, i: ndimage.gaussian_filter(pixels, (0.8, 0.8, 0)),
    "through the codec": lambda pixels, i: through_codec(pixels),
    "noisy": lambda pixels, i: np.clip(
        pixels + np.random.default_rng(i).normal(0, 8, pixels.shape), 0, 255
    ).astype(np.uint8),
}


def through_codec(pixels):
    codec = DctCodec()
    return (
        codec.decode(codec.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]))[0]
        .permute(1, 2, 0)
        .numpy()
    )


def falsified(record, rng):
    """The record with the aspect that its skill is about made false."""
    include = [dict(part) for part in record["include"]]
    tag = record["tag"]
    if tag in ("single_object", "two_object"):
        used = {part["class"] for part in include}
        include[rng.integers(len(include))]["class"] = str(rng.choice(sorted(set(scenes.SHAPES) - used)))
    elif tag == "counting":
        include[0]["count"] += 1 if include[0]["count"] == 2 or rng.random() < 0.5 else -1
    elif tag == "colors":
        include[0]["color"] = str(rng.choice(sorted(set(scenes.COLORS) - {include[0]["color"]})))
    elif tag == "color_attr":
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    else:
        others = set(RELATIONS) - {include[1]["position"][0]}
        include[1]["position"] = [str(rng.choice(sorted(others))), 0]
    return {"tag": tag, "include": include, "prompt": "false on purpose"}


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_true_pictures_pass_and_false_captions_fail(name, spoil):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    records = scenes.benchmark_prompts(50, seed=2, max_objects=config.max_objects)
    truth = [scenes.scene_for(record, config, 3, i) for i, record in enumerate(records)]
    pictures = [SPOILERS[spoil](p, i) for i, p in enumerate(scenes.render_all(truth))]
    found = [detect(picture) for picture in pictures]
    right = [scoring.judge(d, r).correct for d, r in zip(found, records, strict=True)]
    wrong = [scoring.judge(d, falsified(r, rng)).correct for d, r in zip(found, records, strict=True)]
    assert len(records) == 400
    result = scoring.summarise((record, [correct]) for record, correct in zip(records, right, strict=True))
    assert result["mean"] >= 0.99
    assert min(result[skill] for skill in scoring.SKILL_OF_TAG.values()) >= 0.96
    assert np.mean(wrong) <= 0.02
    assert result["samples"] == 300
    assert result["held_out_pairs"]["samples"] == 100


@pytest.mark.parametrize("name", CONFIGS)
def test_detections_are_the_objects_where_they_stand(name):
    for scene, pixels in scenes.draw(CONFIGS[name], 21, range(150)):
        found = detect(pixels)
        assert len(found) == len(scene.things)
        for thing in scene.things:
            x, y = thing.x_px, thing.y_px
            (hit,) = [d for d in found if d.box_px[0] <= x <= d.box_px[2] and d.box_px[1] <= y <= d.box_px[3]]
            assert (hit.shape, hit.color) == (thing.shape, thing.color)
            assert abs((hit.box_px[0] + hit.box_px[2]) / 2 - x) <= 1
            assert hit.fit > 0.85


# ---------------------------------------------------------------- hard pictures


@pytest.mark.parametrize("colors", [("red", "blue"), ("white", "green"), ("yellow", "red"), ("red", "red")])
@pytest.mark.parametrize("shapes", [("circle", "circle"), ("triangle", "triangle"), ("circle", "square")])
@pytest.mark.parametrize("overlap_px", [-0.8, 0.0, 1.0])
def test_touching_objects_are_told_apart(colors, shapes, overlap_px):
    things = (
        Thing(shapes[0], colors[0], 9.3, 16.2, 6.0),
        Thing(shapes[1], colors[1], 21.3 - overlap_px, 16.2, 6.0),
    )
    found = detect(scenes.render([Scene(0, "two_object", 32, 32, 110, things)])[0])
    assert sorted((d.shape, d.color) for d in found) == sorted(zip(shapes, colors, strict=True))


def test_an_object_that_nearly_fills_the_picture_and_one_at_the_edge():
    big = (Thing("circle", "blue", 16.0, 16.0, 14.5),)
    found = detect(scenes.render([Scene(0, "single_object", 32, 32, 100, big)])[0])
    assert [(d.shape, d.color) for d in found] == [("circle", "blue")]
    cut = (Thing("square", "red", 4.0, 16.0, 7.0),)  # the left third is outside
    found = detect(scenes.render([Scene(0, "single_object", 32, 32, 100, cut)])[0])
    assert [(d.color, d.box_px[0]) for d in found] == [("red", 0.0)]


def test_specks_are_no_objects_and_foreign_colours_have_no_name():
    pixels = np.full((64, 64, 3), 120, np.uint8)
    pixels[10:12, 10:13] = (226, 36, 36)
    assert detect(pixels) == []
    pixels[30:44, 30:44] = (0, 210, 210)  # cyan
    (found,) = detect(pixels)
    assert (found.shape, found.color, found.box_px) == ("square", None, (30.0, 30.0, 44.0, 44.0))


def test_bars_and_ragged_blobs_have_no_shape():
    pixels = np.full((64, 64, 3), 120, np.uint8)
    pixels[30:36, 8:50] = (226, 36, 36)
    assert [d.shape for d in detect(pixels)] == [None]
    pixels[:] = 120
    pixels[20:44, 30:34] = pixels[30:34, 20:44] = (226, 36, 36)  # a cross
    assert [d.shape for d in detect(pixels)] == [None]


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (96, 48), (256, 256)])
def test_anything_can_be_scored(size):
    record = scenes.benchmark_prompts(1)[0]
    rng = np.random.default_rng(size[0])
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (*size, 3)), (3, 3, 0))
    odd = [
        rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        (rng.random((*size, 1)) < 0.5).repeat(3, 2).astype(np.uint8) * 255,
        np.clip(smooth * 600 + 120, 0, 255).astype(np.uint8),
        np.indices(size).sum(0)[..., None].repeat(3, 2).astype(np.uint8),
        np.eye(*size, dtype=np.uint8)[..., None].repeat(3, 2) * 255,
    ]
    for pixels in odd:
        assert not scoring.score_image(pixels, record).correct
    for value in (0, 1, 36, 128, 252, 255):
        assert detect(np.full((*size, 3), value, np.uint8)) == []
    for color in scenes.COLORS.values():  # a picture of one palette colour is an empty background
        assert detect(np.broadcast_to(np.array(color, np.uint8), (*size, 3))) == []


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((31, 64, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        detect(pixels)


# ---------------------------------------------------------------- rules


def geneval_relations(box_a, box_b):
    """GenEval's `relative_position`, from its source."""
    boxes = np.array([box_a, box_b]).reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=-2)
    dim_a, dim_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - 0.1 * (dim_a + dim_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    found = set()
    for relation, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True):
        if holds:
            found.add(relation)
    return found


def test_relations_are_genevals():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        corners = rng.integers(0, 20, (2, 2)).astype(float)
        boxes = [(*c, *(c + s)) for c, s in zip(corners, rng.integers(1, 30, (2, 2)), strict=True)]
        a, b = (Detection("circle", "red", tuple(map(float, box)), 1.0) for box in boxes)
        expected = geneval_relations(*boxes)
        assert scoring.relations(a, b) == expected
        seen.add(frozenset(expected))
    assert len(seen) == 9, "none, four single and four diagonal relations"


def at(shape, color, x, y=10.0, side=10.0, fit=0.9):
    return Detection(shape, color, (x, y, x + side, y + side), fit)


RED_CIRCLE, BLUE_SQUARE = at("circle", "red", 2), at("square", "blue", 18)


def record(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


CIRCLE, SQUARE = {"class": "circle", "count": 1}, {"class": "square", "count": 1}


@pytest.mark.parametrize(
    ("detections", "metadata", "reason"),
    [
        ([RED_CIRCLE], record("single_object", CIRCLE), ""),
        ([], record("single_object", CIRCLE), "expected 1 circle, found 0"),
        ([RED_CIRCLE, BLUE_SQUARE], record("single_object", CIRCLE), "expected 1 objects in all, found 2"),
        ([RED_CIRCLE, BLUE_SQUARE], record("two_object", CIRCLE, SQUARE), ""),
        (
            [RED_CIRCLE, at(None, "blue", 18)],
            record("two_object", CIRCLE, SQUARE),
            "expected 1 square, found 0",
        ),
        ([RED_CIRCLE], record("colors", CIRCLE | {"color": "blue"}), "expected 1 blue circle, found 0"),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            record("color_attr", CIRCLE | {"color": "red"}, SQUARE | {"color": "blue"}),
            "",
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            record("color_attr", CIRCLE | {"color": "blue"}, SQUARE | {"color": "red"}),
            "expected 1 blue circle, found 0; expected 1 red square, found 0",
        ),
        ([RED_CIRCLE, BLUE_SQUARE], record("position", SQUARE, CIRCLE | {"position": ["left of", 0]}), ""),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            record("position", SQUARE, CIRCLE | {"position": ["above", 0]}),
            "expected circle above its target, found left of it",
        ),
        (
            [RED_CIRCLE],
            record("position", SQUARE, CIRCLE | {"position": ["above", 0]}),
            "expected 1 square, found 0; no target for circle to be above",
        ),
        (
            [at("circle", "red", x, fit=1 - x / 100) for x in (0, 10, 20)],
            record("counting", CIRCLE | {"count": 2}, exclude=[CIRCLE | {"count": 3}]),
            "expected fewer than 3 circle, found 3; expected 2 objects in all, found 3",
        ),
        # of two circles the one that names its colour chooses first
        (
            [at("circle", "red", 2), at("circle", "blue", 18, fit=0.8)],
            record("color_attr", CIRCLE, CIRCLE | {"color": "red"}),
            "",
        ),
    ],
)
def test_rules(detections, metadata, reason):
    scoring.check_metadata(metadata)
    result = scoring.judge(detections, metadata)
    assert (result.correct, result.reason) == (not reason, reason)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "one JSON object"),
        (record("colours", CIRCLE), "tag 'colours'"),
        ({"tag": "colors", "include": [CIRCLE]}, "'prompt' is missing"),
        (record("colors"), "at least one requirement"),
        (record("colors", "circle"), "class 'circle'"),
        (record("colors", {"class": "bench", "count": 1}), "class 'bench' is no shape"),
        (record("colors", CIRCLE | {"count": 0}), "count 0"),
        (record("colors", CIRCLE | {"count": "two"}), "count 'two'"),
        (record("colors", CIRCLE | {"color": "rde"}), "did you mean red?"),
        (record("position", CIRCLE | {"position": ["left of", 0]}), "index of an earlier requirement"),
        (record("position", SQUARE, CIRCLE | {"position": ["beside", 0]}), "position ['beside', 0]"),
        (record("colors", CIRCLE) | {"exclude": {}}, "'exclude' must be a list"),
    ],
)
def test_bad_metadata_is_named(metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scoring.score_image(np.zeros((32, 32, 3), np.uint8), metadata)


def test_summary_is_the_mean_of_the_skills():
    def records(tag, correct, wrong, **more):
        return [(record(tag, CIRCLE) | more, [i < correct]) for i in range(correct + wrong)]

    scored = records("single_object", 4, 0) + records("two_object", 1, 1) + records("counting", 0, 8)
    scored += records("color_attr", 9, 0, split=scenes.HELD_OUT_SPLIT)
    result = scoring.summarise(scored)
    assert (result["single_object"], result["two_objects"], result["counting"]) == (1.0, 0.5, 0.0)
    assert result["mean"] == 0.5  # of skills, not of pictures
    assert (result["colors"], result["position"], result["color_attribution"]) == (None, None, None)
    assert result["samples"] == 14
    assert result["held_out_pairs"] == {
        "color_attribution": 1.0, "samples": 9, "standard_error": {"color_attribution": 0.0},
    }  # fmt: skip
    assert scoring.summarise([])["mean"] is None


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Two prompts; the second has one right and one wrong picture."""
    config = SceneConfig()
    records = scenes.benchmark_prompts(3)
    chosen = [next(r for r in records if r["tag"] == tag) for tag in ("colors", "counting")]
    for index, (item, others) in enumerate(zip(chosen, reversed(chosen), strict=True)):
        samples = tmp_path / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(item))
        pictures = scenes.render_all([scenes.scene_for(r, config, 0, index) for r in (item, others)])
        for number, pixels in enumerate(pictures[: index + 1]):
            Image.fromarray(pixels).save(samples / f"{number:04d}.png")
    return tmp_path


def test_a_folder_is_scored_picture_by_picture(folder):
    (folder / "results.jsonl").write_text("not a prompt folder")
    (folder / "00001/samples/notes.txt").write_text("not a sample")
    result = scoring.score_folder(folder)
    assert (result["colors"], result["counting"], result["mean"], result["samples"]) == (1.0, 0.5, 0.75, 3)
    judged = [verdicts for _, verdicts in scoring.by_prompt(scoring.score_samples(folder))]
    assert judged == [[True], [True, False]]
    assert result["standard_error"]["counting"] is None  # of one prompt alone
    rows = [s.row() for s in scoring.score_samples(folder)]
    assert [(r["filename"], r["correct"]) for r in rows] == [
        ("00000/samples/0000.png", True),
        ("00001/samples/0000.png", True),
        ("00001/samples/0001.png", False),
    ]
    assert rows[2]["reason"].startswith("expected")


def test_pictures_with_a_palette_or_transparency_are_read_as_rgb(folder):
    file = folder / "00000/samples/0000.png"
    image = Image.open(file)
    image.convert("RGBA").save(file)
    assert scoring.score_folder(folder)["colors"] == 1.0
    image.quantize(32).save(file)
    assert scoring.score_folder(folder)["colors"] == 1.0


def spoil_truncate(folder):
    file = folder / "00001/samples/0001.png"
    file.write_bytes(file.read_bytes()[:100])
    return file


def spoil_small(folder):
    file = folder / "00001/samples/0001.png"
    Image.new("RGB", (31, 40)).save(file)
    return file


def spoil_no_metadata(folder):
    (folder / "00001/metadata.jsonl").unlink()
    return folder / "00001/metadata.jsonl"


def spoil_bad_json(folder):
    (folder / "00001/metadata.jsonl").write_text('{"tag": ')
    return folder / "00001/metadata.jsonl"


def spoil_bad_encoding(folder):
    (folder / "00001/metadata.jsonl").write_bytes(b"\xff\xfe{}")
    return folder / "00001/metadata.jsonl"


def spoil_foreign_prompt(folder):
    bench = {"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (folder / "00001/metadata.jsonl").write_text(json.dumps(bench))
    return folder / "00001/metadata.jsonl"


def spoil_no_samples(folder):
    for file in (folder / "00001/samples").iterdir():
        file.unlink()
    return folder / "00001/samples"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_truncate, spoil_small, spoil_no_metadata, spoil_bad_json, spoil_bad_encoding,
        spoil_foreign_prompt, spoil_no_samples,
    ],
)  # fmt: skip
def test_damage_names_the_file(folder, spoil):
    file = spoil(folder)
    with pytest.raises(DataError, match=re.escape(str(file))):
        scoring.score_folder(folder)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        scoring.score_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no prompt folders"):
        scoring.score_folder(tmp_path)
