"""Scenes are deterministic, true to their captions, and hold nothing that is held out."""

from __future__ import annotations

import collections
import io
import itertools
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data import scenes
from megatron_nucleus.data.scenes import SceneConfig, export, world
from megatron_nucleus.data.scenes.captions import GRAMMAR_HASH, NUMBERS
from megatron_nucleus.utils.errors import ConfigError

GRID = SceneConfig()
FREE = SceneConfig(tier="free", scene_sizes=("64x64", "48x80", "80x48", "128x96"), max_objects=6)
CROWDED = SceneConfig(tier="free", scene_sizes=("32x32",), max_objects=6, mixed_counting=0.5)
TIERS = pytest.mark.parametrize("config", [GRID, FREE, CROWDED], ids=["grid", "free", "crowded"])


def scenes_of(config, count, seed=0):
    return [scenes.make_scene(config, seed, i) for i in range(count)]


# ---------------------------------------------------------------- determinism


@TIERS
def test_a_scene_depends_on_seed_and_id_alone(config):
    together = list(scenes.draw(config, 7, range(150)))
    for index in (0, 93, 149):
        ((scene, pixels),) = scenes.draw(config, 7, [index])
        assert scene == together[index][0]
        assert np.array_equal(pixels, together[index][1])
        assert scenes.captions(scene) == scenes.captions(together[index][0])
    assert scenes.make_scene(config, 8, 93) != together[93][0]


def test_the_first_scenes_never_change():
    # other scenes under the same seed would silently change every corpus and score
    said = [scenes.captions(scene)[1].text for scene in scenes_of(GRID, 5)]
    assert said == [
        "a red triangle above a red square",
        "a photo of a blue circle and a blue square",
        "a photo of a blue triangle and a green circle",
        "a photo of a yellow triangle above a white square",
        "a picture of a red triangle below a green circle",
    ]
    first = scenes.make_scene(GRID, 0, 0)
    assert (first.tag, first.background, first.relation) == ("position", 79, "above")


# ---------------------------------------------------------------- pixels


@TIERS
def test_pixels_equal_a_brute_force_rendering(config):
    for scene, pixels in scenes.draw(config, 1, range(20)):
        expected = supersampled(scene)
        error = np.abs(pixels.astype(float) - expected)
        assert error.mean() < 0.5, scene
        assert error.max() < 60, scene  # the pixel at a tip


def supersampled(scene, fine=16):
    y = ((np.arange(scene.height_px * fine) + 0.5) / fine)[:, None]
    x = (np.arange(scene.width_px * fine) + 0.5) / fine
    out = np.full((scene.height_px, scene.width_px, 3), float(scene.background))
    for thing in scene.things:
        dx, dy, half = x - thing.x_px, y - thing.y_px, thing.half_px
        if thing.shape == "circle":
            inside = dx**2 + dy**2 <= half**2
        elif thing.shape == "square":
            inside = (abs(dx) <= 0.88 * half) & (abs(dy) <= 0.88 * half)
        else:  # apex one half extent above the centre, base 0.8 below it
            inside = (abs(dx) <= (dy + half) / 1.8) & (dy <= 0.8 * half)
        share = inside.reshape(scene.height_px, fine, scene.width_px, fine).mean(axis=(1, 3))[..., None]
        out = out * (1 - share) + np.array(scenes.COLORS[thing.color]) * share
    return out


@TIERS
def test_objects_lie_inside_and_do_not_touch(config):
    for scene in scenes_of(config, 1500):
        assert f"{scene.width_px}x{scene.height_px}" in config.scene_sizes
        for thing in scene.things:
            assert thing.half_px >= 4.0
            assert thing.half_px < thing.x_px < scene.width_px - thing.half_px
            assert thing.half_px < thing.y_px < scene.height_px - thing.half_px
        for a, b in itertools.combinations(scene.things, 2):
            gap = max(abs(a.x_px - b.x_px), abs(a.y_px - b.y_px)) - a.half_px - b.half_px
            assert gap >= 1.0, scene


def test_palette_colours_are_far_apart_and_far_from_every_background():
    greys = [(g, g, g) for g in range(world.BACKGROUND_RANGE[0], world.BACKGROUND_RANGE[1] + 1)]
    colors = [np.array(c) for c in scenes.COLORS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2)) > 100
    assert min(np.linalg.norm(a - np.array(g)) for a in colors for g in greys) > 90


def test_render_refuses_mixed_sizes():
    mixed = [scenes.make_scene(FREE, 0, i) for i in range(30)]
    with pytest.raises(ValueError, match="one size"):
        scenes.render(mixed)


# ---------------------------------------------------------------- what is held out


@TIERS
def test_training_scenes_hold_nothing_that_is_held_out(config):
    seen_pairs, seen_compositions = set(), set()
    for scene in scenes_of(config, 4000, seed=3):
        pairs = {(t.color, t.shape) for t in scene.things}
        seen_pairs |= pairs
        seen_compositions |= {tuple(sorted(two)) for two in itertools.combinations(pairs, 2)}
        assert not scenes.holds_held_out(scene)
        for caption in scenes.captions(scene):
            for color, shape in scenes.HELD_OUT_PAIRS:
                assert f"{color} {shape}" not in caption.text
    assert not seen_pairs & scenes.HELD_OUT_PAIRS
    assert not seen_compositions & scenes.HELD_OUT_COMPOSITIONS
    # everything that is not held out is shown: 15 pairs, 60 compositions of different shapes
    assert seen_pairs == set(world.TRAIN_PAIRS)
    assert seen_compositions == set(world.TRAIN_COMPOSITIONS)


def test_the_split_is_a_fifth_of_every_pair_of_shapes():
    everything = {
        scenes.composition(a, b) for a, b in itertools.combinations(world.TRAIN_PAIRS, 2) if a[1] != b[1]
    }
    assert len(everything) == 75
    assert set(world.TRAIN_COMPOSITIONS) | scenes.HELD_OUT_COMPOSITIONS == everything
    assert len(scenes.HELD_OUT_COMPOSITIONS) == 15
    per_shapes = collections.Counter(tuple(sorted((a[1], b[1]))) for a, b in scenes.HELD_OUT_COMPOSITIONS)
    assert set(per_shapes.values()) == {5}
    left = collections.Counter(pair for two in world.TRAIN_COMPOSITIONS for pair in two)
    assert min(left.values()) >= 6, "a pair must be shown beside most others"
    assert {shape for _, shape in scenes.HELD_OUT_PAIRS} == set(scenes.SHAPES)


def test_holds_held_out_sees_third_objects():
    scene = scenes.make_scene(GRID, 0, 0)
    a, b = sorted(scenes.HELD_OUT_COMPOSITIONS)[0]
    others = [("red", "circle"), a, b]
    things = tuple(world.Thing(s, c, 5.0 + 10 * i, 5.0, 4.0) for i, (c, s) in enumerate(others))
    assert scenes.holds_held_out(world.Scene(0, "counting", 32, 32, 100, things))
    assert not scenes.holds_held_out(world.Scene(0, "counting", 32, 32, 100, (things[0],)))
    assert not scenes.holds_held_out(scene)


def test_benchmark_asks_for_held_out_things():
    records = scenes.benchmark_prompts(40, seed=1)
    plain = [r for r in records if "split" not in r]
    held = [r for r in records if r.get("split") == scenes.HELD_OUT_SPLIT]
    assert collections.Counter(r["tag"] for r in plain) == dict.fromkeys(scenes.TAGS, 40)
    assert collections.Counter(r["tag"] for r in held) == {"colors": 40, "color_attr": 40}
    for record in plain:
        named = named_pairs(record["prompt"])
        assert not named & scenes.HELD_OUT_PAIRS
        if record["tag"] in ("two_object", "position", "color_attr"):
            assert tuple(sorted(named)) in scenes.HELD_OUT_COMPOSITIONS, record
        if record["tag"] == "color_attr":
            assert len({color for color, _ in named}) == 2
    for record in held:
        assert named_pairs(record["prompt"]) & scenes.HELD_OUT_PAIRS, record


def named_pairs(text):
    pattern = rf"({'|'.join(scenes.COLORS)}) ({'|'.join(scenes.SHAPES)})s?\b"
    return set(re.findall(pattern, text))


def test_benchmark_is_deterministic_and_does_not_repeat_itself_early():
    assert scenes.benchmark_prompts(30, seed=4) == scenes.benchmark_prompts(30, seed=4)
    assert scenes.benchmark_prompts(30, seed=4) != scenes.benchmark_prompts(30, seed=5)
    few, many = scenes.benchmark_prompts(10), scenes.benchmark_prompts(40)
    for tag in scenes.TAGS:
        of = [[r["prompt"] for r in rs if r["tag"] == tag and "split" not in r] for rs in (few, many)]
        assert of[0] == of[1][:10], "more prompts continue the same list"
    counting = [r["prompt"] for r in many if r["tag"] == "counting"]
    assert len(set(counting[:9])) == 9
    assert set(collections.Counter(counting).values()) <= {4, 5}
    positions = [r["prompt"] for r in many if r["tag"] == "position"]
    assert len(set(positions)) == 40
    assert {w for p in positions for w in p.split()} >= {"left", "right", "above", "below"}


def test_benchmark_prompts_use_genevals_sentences():
    patterns = {
        "single_object": r"a photo of a S",
        "two_object": r"a photo of a C S and a C S",
        "counting": r"a photo of (two|three|four|five|six) Ss",
        "colors": r"a photo of a C S",
        "position": r"a photo of a C S (left of|right of|above|below) a C S",
        "color_attr": r"a photo of a C S and a C S",
    }
    for record in scenes.benchmark_prompts(25, max_objects=6):
        pattern = patterns[record["tag"]].replace("S", f"({'|'.join(scenes.SHAPES)})")
        assert re.fullmatch(pattern.replace("C", f"({'|'.join(scenes.COLORS)})"), record["prompt"]), record
        if record["tag"] == "position":  # GenEval's order: the reference first, then what stands beside it
            reference, placed = record["include"]
            assert placed["position"][1] == 0
            first, second = re.findall("|".join(scenes.SHAPES), record["prompt"])
            assert (placed["class"], reference["class"]) == (first, second)


# ---------------------------------------------------------------- captions


@TIERS
def test_every_caption_is_true(config):
    for scene in scenes_of(config, 1200, seed=11):
        said = scenes.captions(scene)
        assert [c.length_class for c in said] == ["short", "medium", "detailed"]
        for caption in said:
            assert (caption.source, caption.model, caption.prompt_hash) == ("scenes", None, GRAMMAR_HASH)
            assert set(caption.text.split()) <= scenes.VOCABULARY
            assert_true(caption.text, scene)
        assert len({c.text for c in said}) == 3
        assert {t.color for t in scene.things} <= set(said[1].text.split())
        assert "background" in said[2].text


def assert_true(text, scene):
    """Check a sentence against the scene, without the code that wrote it."""
    text = re.sub(r"^a (photo|picture) of ", "", text)
    body, _, tone = text.partition(" on a ")
    if tone:
        words = {"dark grey background": range(64, 96), "grey background": range(96, 128),
                 "light grey background": range(128, 161)}  # fmt: skip
        assert scene.background in words[tone]
    noun = rf"(a|{'|'.join(NUMBERS[2:])})(?: ({'|'.join(scenes.COLORS)}))? ({'|'.join(scenes.SHAPES)})s?"
    mentions = list(re.finditer(noun, body))
    counted = []
    for mention in mentions:
        number, color, shape = mention.groups()
        fitting = [t for t in scene.things if t.shape == shape and color in (None, t.color)]
        count = 1 if number == "a" else NUMBERS.index(number)
        assert len(fitting) == count, (text, scene)
        assert mention.group(0).endswith("s") == (count > 1)
        counted += fitting
        until = next((m.start() for m in mentions if m.start() > mention.start()), len(body))
        places = re.findall(
            r"(?:at the|in the) ((?:top|bottom)?(?: ?(?:left|right|middle))?)(?= |$)",
            body[mention.end() : until],
        )
        places = [p for p in places if p]
        if " of " not in body:
            assert len(places) in (0, count), (text, places)
        for place in places if " of " not in body else []:
            assert any(lies(t, place, scene) for t in fitting), (text, scene)
    assert len(counted) == len(scene.things), (text, "every object is mentioned exactly once")
    relation = re.search(r"(left of|right of|above|below)", body)
    if relation:
        a, b = counted
        dx, dy = a.x_px - b.x_px, a.y_px - b.y_px
        distance = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation.group(1)]
        across = dy if relation.group(1).endswith("of") else dx
        assert distance > abs(across), (text, scene)


def lies(thing, place, scene):
    x, y = thing.x_px / scene.width_px, thing.y_px / scene.height_px
    near = {"top": y < 0.4, "bottom": y > 0.6, "left": x < 0.4, "right": x > 0.6,
            "middle": 0.4 <= x <= 0.6 and 0.4 <= y <= 0.6}  # fmt: skip
    centred = ("top" in place or "bottom" in place or 0.4 <= y <= 0.6) and (
        "left" in place or "right" in place or 0.4 <= x <= 0.6
    )
    return centred and all(near[word] for word in place.split())


@TIERS
def test_metadata_describes_the_scene(config):
    for scene in scenes_of(config, 600):
        record = scenes.metadata(scene)
        assert record["tag"] == scene.tag
        assert sum(part["count"] for part in record["include"]) == len(scene.things)
        for part in record["include"]:
            fitting = [t for t in scene.things if t.shape == part["class"]]
            assert len(fitting) == part["count"]
            assert ("color" in part) == (scene.tag in ("colors", "color_attr"))
            assert {t.color for t in fitting} == {part["color"]} if "color" in part else True
        assert ("exclude" in record) == (scene.tag == "counting")
        assert_true(record["prompt"], scene)


def test_the_share_of_each_skill_follows_the_weights():
    count = 6000
    tags = collections.Counter(s.tag for s in scenes_of(GRID, count))
    for tag, weight in zip(scenes.TAGS, GRID.skill_weights, strict=True):
        share = weight / sum(GRID.skill_weights)
        assert abs(tags[tag] / count - share) < 4 * (share * (1 - share) / count) ** 0.5, tag
    only = SceneConfig(skill_weights=(0, 0, 1, 0, 0, 0), mixed_counting=0.0, max_objects=3)
    counted = collections.Counter(len(s.things) for s in scenes_of(only, 500))
    assert counted.keys() == {2, 3}
    assert all(len({t.pair for t in s.things}) == 1 for s in scenes_of(only, 500))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_objects": 5}, "--max-objects 5: 2 to 4 for tier grid"),
        ({"max_objects": 1}, "--max-objects 1"),
        ({"tier": "free", "max_objects": 8}, "32x32 px has room for 6"),
        ({"scene_sizes": ()}, "--scene-sizes"),
        ({"scene_sizes": ("32",)}, "--scene-sizes 32: expected WIDTHxHEIGHT"),
        ({"scene_sizes": ("31x64",)}, "both sides must be 32 to 1024"),
        ({"scene_sizes": ("64x9999",)}, "both sides must be 32 to 1024"),
        ({"skill_weights": (1.0, 1.0)}, "expected 6 numbers"),
        ({"skill_weights": (0.0,) * 6}, "not all 0"),
        ({"skill_weights": (1.0, -1.0, 1.0, 1.0, 1.0, 1.0)}, "expected 6 numbers"),
        ({"skill_weights": (1.0, float("nan"), 1.0, 1.0, 1.0, 1.0)}, "expected 6 numbers"),
        ({"mixed_counting": 1.5}, "--mixed-counting 1.5"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SceneConfig(**change)


@TIERS
def test_scene_for_makes_a_prompt_true(config):
    records = scenes.benchmark_prompts(15, max_objects=config.max_objects)
    for index, record in enumerate(records):
        scene = scenes.scene_for(record, config, 9, index)
        assert_true(record["prompt"], scene)
        assert scene == scenes.scene_for(record, config, 9, index)
        assert scene != scenes.scene_for(record, config, 10, index)


def test_scene_for_refuses_more_objects_than_fit():
    record = next(r for r in scenes.benchmark_prompts(40, max_objects=6) if "six" in r["prompt"])
    with pytest.raises(ConfigError, match="asks for 6"):
        scenes.scene_for(record, GRID, 0, 0)


# ---------------------------------------------------------------- files


def test_webdataset_tars_hold_the_scenes(tmp_path):
    config = SceneConfig(tier="free", scene_sizes=("48x80", "64x64"))
    size = scenes.export_scenes(config, tmp_path / "out", count=25, seed=2, samples_per_shard=10)
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["00000.tar", "00001.tar", "00002.tar"]
    assert size == sum(f.stat().st_size for f in files)
    members = {}
    for file, count in zip(files, (10, 10, 5), strict=True):
        with tarfile.open(file) as tar:
            found = {m.name: tar.extractfile(m).read() for m in tar}
        assert len(found) == 3 * count
        members |= found
    for scene, pixels in scenes.draw(config, 2, range(25)):
        key = f"{scene.index:09d}"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[f"{key}.png"]))), pixels)
        side = json.loads(members[f"{key}.json"])
        said = scenes.captions(scene)
        assert [c["text"] for c in side["captions"]] == [c.text for c in said]
        assert [c["length_class"] for c in side["captions"]] == ["short", "medium", "detailed"]
        assert members[f"{key}.txt"].decode() == said[1].text
        assert (side["width"], side["height"]) == (scene.width_px, scene.height_px)
        assert (side["licence"], side["key"]) == ("CC0-1.0", key)
        assert side["metadata"] == scenes.metadata(scene)
        assert (side["tier"], side["episode_bucket"]) == place_of(scene)
        assert [t["x_px"] for t in side["scene"]["things"]] == [t.x_px for t in scene.things]


def place_of(scene):
    """Tier by objects, episode bucket by skill, spelled out."""
    tier = {1: "A1", 2: "A2", 3: "A3", 4: "A4"}.get(len(scene.things), "A5")
    order = {"single_object": "B1", "colors": "B2", "two_object": "B3"}
    return tier, (order | {"counting": "B4", "color_attr": "B5", "position": "B6"})[scene.tag]


def test_every_skill_and_number_of_objects_has_its_place_in_a_curriculum():
    found = {}
    for index in range(600):
        scene = scenes.make_scene(FREE, 1, index)
        place = scenes.side_data(scene)
        assert (place["tier"], place["episode_bucket"]) == place_of(scene)
        found.setdefault(place["episode_bucket"], set()).add(place["tier"])
    assert found == {
        "B1": {"A1"}, "B2": {"A1"}, "B3": {"A2"}, "B4": {"A2", "A3", "A4", "A5"}, "B5": {"A2"}, "B6": {"A2"},
    }  # fmt: skip


def test_a_folder_holds_images_with_captions_beside_them(tmp_path):
    scenes.export_scenes(GRID, tmp_path / "out", count=5, file_format="folder")
    names = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert names == sorted(f"{i:09d}.{e}" for i in range(5) for e in ("png", "json"))
    scene = scenes.make_scene(GRID, 0, 4)
    side = json.loads((tmp_path / "out" / "000000004.json").read_text())
    assert side["captions"][1]["text"] == scenes.captions(scene)[1].text


def test_equal_commands_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        scenes.export_scenes(GRID, tmp_path / name, count=30)
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "--count 0"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
        ({"file_format": "zip"}, "--format zip"),
        ({"seed": 1 << 64}, "--seed"),
    ],
)
def test_bad_exports_are_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        scenes.export_scenes(GRID, tmp_path / "out", **{"count": 3, **change})
    assert not list(tmp_path.iterdir())


def test_export_never_touches_a_folder_in_use_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        scenes.export_scenes(GRID, used, count=3)
    assert [f.name for f in used.iterdir()] == ["mine.txt"]

    real, calls = export.encode_png, []

    def failing(pixels):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(export, "encode_png", failing)
    with pytest.raises(KeyboardInterrupt):
        scenes.export_scenes(GRID, tmp_path / "cut", count=30)
    assert [f.name for f in tmp_path.iterdir()] == ["used"]
