"""tools/train_scorer.py: a planted relation is learnt, a recipe's stage applies it, and bad ratings are named."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.curation.scorers.head import load_head
from megatron_nucleus.data.curation.scorers.statistics import measure
from megatron_nucleus.data.curation.stage import Drop, PayloadSource, Row
from megatron_nucleus.data.curation.stages.score import ScoreConfig, score
from megatron_nucleus.data.images import MAX_PIXELS
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.tiny_encoders import make_encoder
from tools import train_scorer

ROWS, HELD_OUT, NOISE = 80, 40, 0.4


def draw(rng: np.random.Generator) -> Image.Image:
    """A picture of random contrast, colour, brightness and grain."""
    base = rng.integers(0, 256, (4, 5, 3)).astype(np.float64)
    base = base.mean(axis=-1, keepdims=True) + rng.uniform(0, 1) * (base - base.mean(axis=-1, keepdims=True))
    small = Image.fromarray(
        (rng.uniform(60, 180) + rng.uniform(0, 1) * (base - 128)).clip(0, 255).astype(np.uint8)
    )
    pixels = np.asarray(small.resize((80, 64), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(
        (pixels + rng.normal(0, rng.uniform(0, 20), pixels.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Folder of pictures, ratings = 2 + 14 x contrast + noise in a CSV, and the truth of those left out of it."""
    root = tmp_path_factory.mktemp("rated")
    rng = np.random.default_rng(0)
    lines, truth = ["rating,file,rater"], {}
    for number in range(ROWS + HELD_OUT):
        image = draw(rng)
        image.save(root / f"{number:03}.png")
        rating = 2 + 14 * measure(image)[0] + rng.normal(0, NOISE)
        if number < ROWS:
            lines.append(f"{rating},{number:03}.png,me")
        else:
            truth[f"{number:03}.png"] = rating
    (root / "ratings.csv").write_text("\n".join(lines) + "\n")
    return root, truth


def train(root, output, *more: str) -> list[str]:
    return ["--images", str(root), "--ratings", str(root / "ratings.csv"), "--output", str(output), *more]


def rows_of(root, names) -> list[Row]:
    source = PayloadSource(str(root), 1 << 30, MAX_PIXELS)
    values = {"offset": None, "length": None, "captions": None, "scores": None}
    return [Row({"item": name, "container": name.encode(), **values}, source) for name in names]


def test_a_planted_relation_is_learnt_and_the_stage_applies_it(rated, tmp_path, capsys):
    root, truth = rated
    output = tmp_path / "head.safetensors"
    train_scorer.main(train(root, output, "--model", "image_statistics", "--json"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["better_than_mean"] is True
    assert (result["rows"], result["dim"], result["folds"]) == (ROWS, 5, 5)
    assert NOISE * 0.7 < result["rmse"] < NOISE * 1.3 < result["baseline_rmse"] / 2
    assert result["spearman"] > 0.9
    config = ScoreConfig(kind="rating", model="image_statistics", head=str(output))
    results = score.function(rows_of(root, truth), config)
    values = np.array([r["scores"][0]["value"] for r in results])
    expected = np.array(list(truth.values()))
    rmse = np.sqrt(np.mean((values - expected) ** 2))
    assert rmse < 1.4 * NOISE < np.sqrt(np.mean((expected - expected.mean()) ** 2)) / 2
    assert rmse == pytest.approx(result["rmse"], rel=0.5)  # cross-validation said what was to be expected
    # The same head as aesthetic judge, at the published threshold, drops just the pictures that it rates below 5.
    judged = score.function(rows_of(root, truth), ScoreConfig(**{**vars(config), "kind": "aesthetic"}))
    assert [isinstance(r, Drop) for r in judged] == (values < 5).tolist()
    assert 0 < sum(values < 5) < len(values)


def test_equal_ratings_give_an_equal_file_in_any_order(rated, tmp_path, capsys):
    root, _ = rated
    shuffled = tmp_path / "shuffled"
    shutil.copytree(root, shuffled)
    header, *lines = (root / "ratings.csv").read_text().splitlines()
    (shuffled / "ratings.csv").write_text("\n".join([header, *lines]) + "\n")
    heads = []
    for folder, name in ((root, "a"), (shuffled, "b")):
        train_scorer.main(train(folder, tmp_path / name, "--model", "image_statistics"))
        heads.append((tmp_path / name).read_bytes())
    assert heads[0] == heads[1]
    (shuffled / "ratings.csv").write_text("\n".join([header, *lines[::-1]]) + "\n")
    train_scorer.main(train(shuffled, tmp_path / "c", "--model", "image_statistics"))
    first, other = load_head(tmp_path / "a"), load_head(tmp_path / "c")
    assert other.weights == pytest.approx(first.weights)
    assert other.info.rmse == pytest.approx(first.info.rmse)
    assert "RMSE" in capsys.readouterr().out


def test_a_head_on_an_embedding_model(rated, tmp_path, capsys):
    root, truth = rated
    model = make_encoder(tmp_path / "clip", "clip")
    output = tmp_path / "head"
    train_scorer.main(train(root, output, "--model", str(model), "--folds", "4", "--json"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["dim"], result["folds"]) == ("clip", 12, 4)
    assert result["model_revision"].startswith("sha256:")
    config = ScoreConfig(kind="rating", model=str(model), head=str(output))
    (found,) = score.function(rows_of(root, list(truth)[:1]), config)
    assert found["scores"][0]["revision"].startswith(f"clip@{result['model_revision']}+head:")


def test_noise_is_called_noise(rated, tmp_path, capsys):
    root, _ = rated
    rng = np.random.default_rng(5)
    lines = [f"{number:03}.png,{rng.normal()}" for number in range(ROWS)]
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("\n".join(["file,rating", *lines]))
    arguments = ["--images", str(root), "--ratings", str(ratings), "--output", str(tmp_path / "h")]
    train_scorer.main([*arguments, "--model", "image_statistics", "--json"])
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["better_than_mean"] == (result["rmse"] < result["baseline_rmse"])
    assert ("do not use it" in out[-2]) is not result["better_than_mean"]
    assert abs(result["spearman"]) < 0.4


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda lines: [*lines, "nan,003.png,me"], DataError, "line 82: rating nan of 003.png is not finite"),
        (lambda lines: [*lines, "inf,003.png,me"], DataError, "is not finite"),
        (lambda lines: [*lines, "good,003.png,me"], DataError, "line 82: rating 'good' of 003.png is no number"),
        (lambda lines: [*lines, "5,missing.png,me"], DataError, "missing.png: no such file"),
        (lambda lines: [*lines, "5,../003.png,me"], DataError, "../003.png lies outside the folder"),
        (lambda lines: [*lines, "5,/etc/passwd,me"], DataError, "/etc/passwd lies outside the folder"),
        (lambda lines: [*lines, "5,./003.png,me"], DataError, "line 82: 003.png was rated in line 5 already"),
        (lambda lines: [*lines, "5,copy.png,me"], DataError, "copy.png has the same bytes as 003.png; rate it once"),
        (lambda lines: [*lines, "5,ratings.csv,me"], DataError, "line 82: ratings.csv: not_an_image"),
        (lambda lines: [*lines, "5,cut.png,me"], DataError, "line 82: cut.png: undecodable"),
        (lambda lines: [*lines, "3,7,003.png,me"], DataError, "line 82: 4 fields, the header has 3; write"),
        (lambda lines: [*lines, '"3,7",003.png,me'], DataError, "line 82: rating '3,7' of 003.png is no number"),
        (lambda lines: ["file,rating", *(f"{i:03}.png,3,{i}" for i in range(40))], DataError, "line 2: 3 fields, the"),
        (lambda lines: [*lines, "5"], DataError, "line 82: file or rating is empty"),
        (lambda lines: lines[:20], ConfigError, "19 ratings; at least 30 are needed"),
        (lambda lines: ["rate,file", *lines[1:]], ConfigError, "no column rating; found rate, file"),
        (lambda lines: [], ConfigError, "no column file; found none"),
        (lambda lines: ["file,rating", *(f"{i:03}.png,5" for i in range(40))], DataError, "all ratings are 5"),
    ],
)  # fmt: skip
def test_bad_ratings_are_named(rated, tmp_path, edit, error, message):
    folder = tmp_path / "images"
    shutil.copytree(rated[0], folder)
    shutil.copy(folder / "003.png", folder / "copy.png")
    (folder / "cut.png").write_bytes((folder / "004.png").read_bytes()[:900])
    lines = (folder / "ratings.csv").read_text().splitlines()
    (folder / "ratings.csv").write_text("\n".join(edit(lines)))
    with pytest.raises(error, match=re.escape(message)):
        train_scorer.main(train(folder, tmp_path / "head", "--model", "image_statistics"))
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--folds", "1"], "--folds 1: from 2 to the number of ratings, 80"),
        (["--folds", "81"], "--folds 81"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--ratings", "nowhere.csv"], "--ratings nowhere.csv: cannot be read (No such file or directory)"),
        (["--output", "no/folder/head"], "no/folder is no folder"),
        (["--model", "siglip"], "model siglip: no such folder, and no hub id"),
        (["--model", "google/siglip"], "a hub model needs the commit"),
        (["--modle", "x"], "did you mean --model?"),
    ],
)
def test_bad_arguments_are_named(rated, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        train_scorer.main(train(rated[0], tmp_path / "head", "--model", "image_statistics", *change))


def test_an_existing_head_is_not_overwritten(rated, tmp_path):
    (tmp_path / "head").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        train_scorer.main(train(rated[0], tmp_path / "head", "--model", "image_statistics"))
    assert (tmp_path / "head").read_text() == "precious"
