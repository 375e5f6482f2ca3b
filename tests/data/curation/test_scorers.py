"""Choosing a scorer: settings that contradict each other, sharing within a process, own classes, identities, GPUs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.curation import scorers
from megatron_nucleus.data.curation.scorers import (
    KINDS,
    ScorerConfig,
    make_scorer,
    open_features,
    scorer_gpus,
    scorer_identity,
)
from megatron_nucleus.data.curation.scorers.embedding import AlignmentScorer, PromptScorer
from megatron_nucleus.data.curation.scorers.head import Head, HeadInfo, HeadScorer, head_revision, save_head
from megatron_nucleus.data.curation.scorers.statistics import ImageStatistics
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.tiny_encoders import make_encoder

DARKNESS = """
import numpy as np
from megatron_nucleus.data.curation.scorers import Scored

class Darkness:
    name, revision, side_px = "darkness", "1", 64

    def __init__(self, config):
        self.config = config

    def score(self, pictures, captions):
        return [Scored(1 - np.asarray(picture.convert("L")).mean() / 255) for picture in pictures]

class Unfinished:
    def __init__(self, config): ...
"""


def write_head(path, features, **changes) -> str:
    info = HeadInfo(
        features.name, features.revision, features.checksum, features.dim, 40, 0.1, 5, 0.5, 0.8, 1.0, 1.0, 9.0
    )
    weights = np.linspace(-1, 1, features.dim)
    save_head(path, Head(weights, 5.0, dataclasses.replace(info, **changes)))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_encoder(tmp_path_factory.mktemp("encoders") / "siglip", "siglip"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "astetic"}, "kind astetic: unknown (did you mean aesthetic?); one of image_statistics, "),
        ({"kind": "aesthetic", "model": "m"}, "kind aesthetic: needs head; tools/train_scorer.py makes one"),
        ({"kind": "rating", "head": "h"}, "kind rating: needs model, a folder or a hub id"),
        ({"kind": "safety"}, "kind safety: needs model"),
        ({"kind": "prompts", "model": "m"}, "kind prompts: needs prompts"),
        (
            {"kind": "prompts", "model": "m", "prompts": ("a",)},
            "kind prompts: needs against: prompts and against go",
        ),
        ({"kind": "watermark", "model": "m", "against": ("a",)}, "kind watermark: needs prompts"),
        ({"kind": "alignment", "model": "m", "head": "h"}, "kind alignment: takes no head"),
        ({"kind": "alignment", "model": "m", "prompts": ("a",)}, "kind alignment: takes no prompts"),
        ({"kind": "safety", "model": "m", "head": "h", "prompts": ("a",)}, "kind safety: takes no prompts"),
        ({"model": "m"}, "kind image_statistics: takes no model"),
        ({"head": "h"}, "kind image_statistics: takes no head"),
        ({"kind": "alignment", "model": "image_statistics"}, "image_statistics knows no texts"),
        ({"model_revision": "f" * 40}, "model_revision ffff"),
    ],
)
def test_settings_that_do_nothing_or_lack_something_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        ScorerConfig(**settings)
    assert str(error.value).startswith(message) or message in str(error.value)


def test_each_way_gives_its_scorer_and_all_share_one_model(model, tmp_path):
    head = write_head(tmp_path / "head", open_features(model))
    made = {
        "aesthetic": ScorerConfig(kind="aesthetic", model=model, head=head),
        "rating": ScorerConfig(kind="rating", model=model, head=head),
        "safety": ScorerConfig(kind="safety", model=model, head=head),
        "watermark": ScorerConfig(kind="watermark", model=model),
        "prompts": ScorerConfig(
            kind="prompts", model=model, prompts=("a cat",), against=("a circle", "a square")
        ),
        "alignment": ScorerConfig(kind="alignment", model=model),
        "image_statistics": ScorerConfig(),
    }
    assert made.keys() == KINDS.keys()
    types = {name: type(make_scorer(config)) for name, config in made.items()}
    assert types == {
        **dict.fromkeys(("aesthetic", "rating", "safety"), HeadScorer),
        **dict.fromkeys(("watermark", "prompts"), PromptScorer),
        "alignment": AlignmentScorer,
        "image_statistics": ImageStatistics,
    }
    assert make_scorer(made["alignment"]) is make_scorer(ScorerConfig(kind="alignment", model=model))
    alignment, watermark = make_scorer(made["alignment"]), make_scorer(made["watermark"])
    assert alignment._encoder is watermark._encoder is open_features(model)
    assert make_scorer(made["aesthetic"]).revision == f"{alignment.revision}+head:{head_revision(head)}"


def test_default_texts_stand_for_missing_ones_only():
    config = ScorerConfig(kind="watermark", model="m")
    assert config.texts == (("a photo with a watermark",), ("a photo without a watermark",))
    own = ScorerConfig(kind="watermark", model="m", prompts=("logo",), against=("no logo",))
    assert own.texts == (("logo",), ("no logo",))


def test_a_head_on_statistics_needs_no_model(tmp_path, photos):
    head = write_head(tmp_path / "head", ImageStatistics())
    scorer = make_scorer(ScorerConfig(kind="rating", model="image_statistics", head=head))
    expected = (
        ImageStatistics().embed([photos["coffee.png"]]).astype(np.float64)[0] @ np.linspace(-1, 1, 5) + 5
    )
    assert scorer.score([photos["coffee.png"]], [()])[0].value == pytest.approx(expected)


def test_a_scorer_of_ones_own_comes_from_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(DARKNESS)
    heap = [Image.new("RGB", (4, 4), (grey,) * 3) for grey in (0, 51, 255)]
    config = ScorerConfig(kind=f"{tmp_path}/my_scorers.py:Darkness", model="anything", head="of its own")
    scorer = make_scorer(config)
    assert [s.value for s in scorer.score(heap, [()] * 3)] == pytest.approx([1, 0.8, 0])
    assert scorer.config == config
    assert make_scorer(config) is scorer
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_scorer(ScorerConfig(kind="my_scorers:Darkness")).score(heap[:1], [()])[0].value == 1
    monkeypatch.chdir(tmp_path)
    assert type(make_scorer(ScorerConfig(kind="my_scorers.py:Darkness"))) is type(scorer)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("{0}/nowhere.py:Darkness", "nowhere.py: no such file"),
        ("{0}/scorers.py:Darkess", "has no class Darkess (did you mean Darkness?)"),
        ("{0}/scorers.py:np", "has no class np"),
        ("{0}/scorers.py:Unfinished", "it has no name; a scorer has name, revision, side_px, score"),
        ("{0}/broken.py:Darkness", "ModuleNotFoundError: No module named 'nonesuch'"),
        ("nonesuch.scorers:Darkness", "ModuleNotFoundError"),
    ],
)
def test_own_scorers_that_cannot_be_made_are_named(tmp_path, kind, message):
    (tmp_path / "scorers.py").write_text(DARKNESS)
    (tmp_path / "broken.py").write_text("import nonesuch")
    config = ScorerConfig(kind=kind.format(tmp_path))
    with pytest.raises(ConfigError) as error:
        make_scorer(config)
    assert message in str(error.value)
    assert kind.format(tmp_path) in str(error.value)


def test_identities_follow_models_heads_and_own_sources(model, tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(DARKNESS)
    other.write_text(DARKNESS + "\n# changed")
    identities = [scorer_identity(ScorerConfig(kind=f"{path}:Darkness")) for path in (one, other)]
    assert identities[0] != identities[1]
    assert scorer_identity(ScorerConfig()) == ""
    head = write_head(tmp_path / "head", open_features(model))
    again = write_head(tmp_path / "again", open_features(model))
    better = write_head(tmp_path / "better", open_features(model), rmse=0.4)
    names = (head, again, better)
    found = [scorer_identity(ScorerConfig(kind="rating", model=model, head=name)) for name in names]
    assert found[0] == found[1] != found[2]
    assert found[0] == f"{open_features(model).revision} {head_revision(head)}"
    assert scorer_identity(ScorerConfig(kind="alignment", model=model)) == open_features(model).revision
    hub = ScorerConfig(kind="alignment", model="owner/name", model_revision="f" * 40)
    assert scorer_identity(hub) == ""  # the settings hold the commit


def test_identities_find_mistakes_before_the_work_starts(model, tmp_path):
    head = write_head(tmp_path / "head", ImageStatistics())
    with pytest.raises(ConfigError, match="trained on image_statistics"):
        scorer_identity(ScorerConfig(kind="rating", model=model, head=head))
    with pytest.raises(ConfigError, match="head nowhere: no such file"):
        scorer_identity(ScorerConfig(kind="rating", model=model, head="nowhere"))
    with pytest.raises(ConfigError, match="model nowhere: no such folder"):
        scorer_identity(ScorerConfig(kind="alignment", model="nowhere"))
    with pytest.raises(ConfigError, match="needs the commit"):
        scorer_identity(ScorerConfig(kind="alignment", model="owner/name"))


def test_gpus_are_asked_for_by_models_that_run_on_one(monkeypatch):
    import torch

    alignment = ScorerConfig(kind="alignment", model="m")
    for present in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert scorer_gpus(alignment) == float(present)
        assert scorer_gpus(dataclasses.replace(alignment, device="cuda")) == 1
        assert scorer_gpus(dataclasses.replace(alignment, device="cpu")) == 0
        assert scorer_gpus(ScorerConfig(device="cuda")) == 0
        assert scorer_gpus(ScorerConfig(kind="rating", model="image_statistics", head="h")) == 0
        assert scorer_gpus(ScorerConfig(kind="my.py:Scorer")) == 0
        assert scorer_gpus(ScorerConfig(kind="my.py:Scorer", device="cuda")) == 1


def test_a_missing_gpu_is_said(model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda: torch finds no CUDA device here"):
        make_scorer(ScorerConfig(kind="alignment", model=model, device="cuda"))


def test_statistics_load_neither_torch_nor_transformers():
    code = (
        "import sys; from megatron_nucleus.data.curation import scorers as s; c = s.ScorerConfig();"
        "s.make_scorer(c); s.scorer_identity(c); s.scorer_gpus(c);"
        "print(sorted({'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
    assert scorers.REASONS == ("low_score", "low_aesthetic", "unsafe", "watermark", "low_alignment")
