"""The stage `score`: what it appends, what it drops and why, and what it refuses."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from megatron_nucleus.data.curation.scorers import Scored, make_scorer
from megatron_nucleus.data.curation.scorers.head import Head, HeadInfo, save_head
from megatron_nucleus.data.curation.scorers.statistics import ImageStatistics
from megatron_nucleus.data.curation.stage import Drop, PayloadSource, Row
from megatron_nucleus.data.curation.stages.score import ScoreConfig, score
from megatron_nucleus.data.images import MAX_PIXELS, UnusableImage
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.tiny_encoders import make_encoder

OWN = """
import numpy as np
from megatron_nucleus.data.curation.scorers import Scored

class Numbers:
    name, revision, side_px = "numbers", "7", 8
    answer = None

    def __init__(self, config): ...

    def score(self, pictures, captions):
        return self.answer(pictures, captions)
"""


def caption(text: str, alignment: float | None = None) -> dict:
    names = ("length_class", "source", "model", "model_revision", "prompt_hash")
    return {
        "text": text,
        **dict.fromkeys(names),
        "length_class": "short",
        "source": "web",
        "alignment": alignment,
    }


class Corpus:
    """Rows over files in a folder."""

    def __init__(self, folder):
        self._folder = folder
        self._source = PayloadSource(str(folder), 1 << 30, MAX_PIXELS)

    def row(self, image: Image.Image | bytes, captions: Any = (), scores: Any = None) -> Row:
        name = f"{len(list(self._folder.iterdir()))}.png"
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            image = buffer.getvalue()
        (self._folder / name).write_bytes(image)
        values = {"item": name, "container": name.encode(), "offset": None, "length": None}
        return Row({**values, "captions": captions, "scores": scores}, self._source)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "files").mkdir()
    return Corpus(tmp_path / "files")


@pytest.fixture
def numbers(tmp_path):
    """A scorer of one's own whose answers a test decides; returns (kind, setter)."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    kind = f"{path}:Numbers"
    return kind, lambda answer: setattr(make_scorer(ScoreConfig(kind=kind)), "answer", answer)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_encoder(tmp_path_factory.mktemp("encoders") / "siglip", "siglip"))


def picture(level: int, spread: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(
        (level + rng.integers(-spread, spread + 1, (64, 80, 3))).clip(0, 255).astype(np.uint8)
    )


def test_a_score_is_appended_with_what_gave_it(corpus):
    others = [{"scorer": "owner", "revision": "x@1", "value": 0.5}]
    captions = [caption("a cat", 0.25)]
    rows = [corpus.row(picture(128, 90)), corpus.row(picture(128, 5), captions, others)]
    results = score.function(rows, ScoreConfig())
    values = [s.value for s in ImageStatistics().score([row.picture() for row in rows], [(), ()])]
    entries = [
        {"scorer": "image_statistics", "revision": "image_statistics@1", "value": float(np.float32(value))}
        for value in values
    ]
    assert results == [
        {"scores": entries[:1], "captions": []},
        {"scores": [*others, entries[1]], "captions": captions},
    ]
    for field in score.adds:  # what it returns has the types that it declares
        pa.array([result[field.name] for result in results], field.type)


def test_a_metric_is_one_number_and_may_have_a_name_of_its_own(corpus):
    before = [{"scorer": name, "revision": "old@1", "value": 0.5} for name in ("image_statistics", "mine")]
    row = corpus.row(picture(128, 90), scores=before)
    (first,) = score.function([row], ScoreConfig())
    assert [entry["scorer"] for entry in first["scores"]] == ["mine", "image_statistics"]
    (second,) = score.function([row], ScoreConfig(metric="mine"))
    assert [entry["revision"] for entry in second["scores"]] == ["old@1", "image_statistics@1"]


def test_thresholds_drop_with_a_declared_reason(corpus, numbers):
    kind, answer_with = numbers
    answer_with(lambda pictures, captions: [Scored(i / 4) for i in range(len(pictures))])
    rows = [corpus.row(picture(128, 20, seed)) for seed in range(5)]
    results = score.function(rows, ScoreConfig(kind=kind, min=0.25, max=0.75, reason="unsafe"))
    assert results[0] == Drop("unsafe", "numbers 0, limits 0.25 to 0.75")
    assert results[4] == Drop("unsafe", "numbers 1, limits 0.25 to 0.75")
    assert [r["scores"][0] for r in results[1:4]] == [
        {"scorer": "numbers", "revision": "numbers@7", "value": value} for value in (0.25, 0.5, 0.75)
    ]
    assert [isinstance(r, Drop) for r in score.function(rows, ScoreConfig(kind=kind, min=0.5))] == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert not any(isinstance(r, Drop) for r in score.function(rows, ScoreConfig(kind=kind, drop=False)))
    assert score.verdict("unsafe") == "rejected"
    assert all(score.verdict(reason) == "rejected" for reason in score.rejects)
    assert score.verdict("score_failed") == "quarantined"


def test_a_score_at_the_limit_stays(corpus, numbers):
    kind, answer_with = numbers
    answer_with(lambda pictures, captions: [Scored(0.65)])
    rows = [corpus.row(picture(128, 20))]
    (result,) = score.function(rows, ScoreConfig(kind=kind, min=0.65, max=0.65))
    assert result["scores"][0]["value"] == np.float32(0.65)
    assert isinstance(score.function(rows, ScoreConfig(kind=kind, min=0.6500001))[0], Drop)


def test_an_aesthetic_head_has_the_published_threshold(corpus, tmp_path):
    features = ImageStatistics()
    info = HeadInfo(
        features.name, features.revision, features.checksum, 5, 40, 0.1, 5, 0.5, 0.8, 1.0, 1.0, 10.0
    )
    save_head(tmp_path / "head", Head(np.array([20.0, 0, 0, 0, 0]), 0.0, info))  # 20 times the contrast
    settings = {"kind": "aesthetic", "model": "image_statistics", "head": str(tmp_path / "head")}
    config = ScoreConfig(**settings)
    assert config.limits == (5.0, None)
    assert config.drop_reason == "low_aesthetic"
    rows = [corpus.row(picture(128, 110)), corpus.row(picture(128, 10))]
    kept, dropped = score.function(rows, config)
    assert kept["scores"][0]["value"] > 5
    assert isinstance(dropped, Drop)
    assert dropped.reason == "low_aesthetic"
    assert "limits 5 to none" in dropped.detail
    low = score.function(rows, ScoreConfig(**settings, min=0.1))
    assert low[1]["scores"][0]["value"] == pytest.approx(
        20 * features.embed([rows[1].picture()])[0, 0], rel=1e-6
    )
    assert not any(isinstance(r, Drop) for r in score.function(rows, ScoreConfig(**settings, drop=False)))


def test_only_the_published_threshold_drops_by_itself():
    assert ScoreConfig().limits == (None, None)
    for kind in ("safety", "watermark", "alignment"):
        assert ScoreConfig(kind=kind, model="m").limits == (None, None)
    reasons = {
        kind: ScoreConfig(kind=kind, model="m").drop_reason for kind in ("safety", "watermark", "alignment")
    }
    assert reasons == {"safety": "unsafe", "watermark": "watermark", "alignment": "low_alignment"}


def test_a_threshold_off_the_heads_scale_is_refused_before_the_work(tmp_path):
    features = ImageStatistics()
    info = HeadInfo(
        features.name, features.revision, features.checksum, 5, 40, 0.1, 5, 0.5, 0.8, 1.0, 0.0, 1.0
    )
    save_head(tmp_path / "head", Head(np.ones(5), 0.0, info))
    config = ScoreConfig(kind="aesthetic", model="image_statistics", head=str(tmp_path / "head"))
    with pytest.raises(
        ConfigError, match=r"outside the ratings that head .* learnt, 0 to 1; give min and max"
    ):
        score.identity(config)
    assert score.identity(ScoreConfig(kind=config.kind, model=config.model, head=config.head, min=0.5))


def test_alignment_fills_the_captions_and_spares_images_without_any(corpus, model):
    captions = [caption("a red circle"), caption("a watermark", 0.99)]
    rows = [
        corpus.row(picture(100, 60), captions),
        corpus.row(picture(100, 60, 1)),
        corpus.row(picture(9, 9), None),
    ]
    config = ScoreConfig(kind="alignment", model=model, device="cpu")
    results = score.function(rows, config)
    texts = [[c["text"] for c in captions], [], []]
    expected = make_scorer(config).score([row.picture() for row in rows], texts)
    fits = [c["alignment"] for c in results[0]["captions"]]
    assert fits == pytest.approx(expected[0].captions)
    assert [{**c, "alignment": None} for c in results[0]["captions"]] == [
        {**c, "alignment": None} for c in captions
    ]
    (entry,) = results[0]["scores"]
    assert entry["value"] == max(fits)
    assert entry["scorer"] == "alignment"
    assert entry["revision"].startswith("siglip@sha256:")
    assert results[1:] == [{"scores": [], "captions": []}] * 2
    assert captions[0]["alignment"] is None  # the row's own values stay as they came
    dropping = score.function(rows, ScoreConfig(kind="alignment", model=model, device="cpu", min=0.9999))
    assert dropping[0].reason == "low_alignment"
    assert dropping[1:] == results[1:]
    again = score.function(rows[::-1], config)
    assert again[::-1] == results


def test_large_pictures_arrive_reduced(corpus, numbers):
    kind, answer_with = numbers
    sizes: list[tuple[int, int]] = []

    def note(pictures, captions):
        sizes.extend(image.size for image in pictures)
        return [Scored(0.0)] * len(pictures)

    answer_with(note)
    score.function(
        [corpus.row(Image.new("RGB", size)) for size in ((640, 320), (15, 9), (4, 4))], ScoreConfig(kind=kind)
    )
    assert sizes == [(16, 8), (15, 9), (4, 4)]  # shortest side at least the 8 px that it asks for


def test_what_fails_for_a_row_raises_and_what_is_a_mistake_stops(corpus, numbers):
    kind, answer_with = numbers
    config = ScoreConfig(kind=kind)
    rows = [corpus.row(picture(128, 20), [caption("a"), caption("b")])]
    for value in (float("nan"), float("inf"), 1e39):  # the last is not finite as float32
        answer_with(lambda pictures, captions, value=value: [Scored(value)])
        with pytest.raises(ValueError, match="not finite"):
            score.function(rows, config)
    answer_with(lambda pictures, captions: [Scored(1.0, (0.5, float("nan")))])
    with pytest.raises(ValueError, match="not finite"):
        score.function(rows, config)
    answer_with(lambda pictures, captions: [])
    with pytest.raises(ConfigError, match="it gave 0 scores for 1 images"):
        score.function(rows, config)
    answer_with(lambda pictures, captions: [Scored(1.0, (0.5,))])
    with pytest.raises(ConfigError, match="it gave 1 numbers for 2 captions"):
        score.function(rows, config)
    with pytest.raises(UnusableImage, match="not_an_image"):
        score.function([corpus.row(b"no picture")], ScoreConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min": 0.9, "max": 0.1}, "min 0.9 is above max 0.1"),
        ({"min": float("nan")}, "min nan: a finite number"),
        ({"max": float("inf")}, "max inf: a finite number"),
        ({"drop": False, "min": 0.5}, "drop false: min and max do nothing"),
        ({"reason": "ugly"}, "reason ugly: unknown"),
        ({"reason": "low_scores"}, "did you mean low_score?"),
        ({"kind": "aesthetic", "model": "m", "head": "h", "max": 4.0}, "min 5.0 is above max 4.0"),
        ({"kind": "rating", "model": "m"}, "kind rating: needs head"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        ScoreConfig(**settings)
    assert message in str(error.value)


def test_the_version_follows_the_model_and_the_settings(model, tmp_path):
    config = ScoreConfig(kind="alignment", model=model)
    assert score.identity(config).startswith("sha256:")
    assert score.gpus(ScoreConfig()) == 0
    assert len(score.modules) == len(set(score.modules))
