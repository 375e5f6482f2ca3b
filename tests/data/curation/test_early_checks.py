"""What is wrong anywhere in a recipe is said before its first stage runs, and before the output folder is taken."""

from __future__ import annotations

import pytest

from megatron_nucleus.data.curation import recipe, runner
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.recipe import RecipeConfig, StageList, resolve
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.helpers import encode, make_settings, write_captioned

HUB = {"model": "owner/name"}
HTTP = {"captioner": "http", "endpoint": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
OWN = """
import pyarrow as pa
from megatron_nucleus.data.curation.stage import row_stage
from megatron_nucleus.data.index import SCORE_TYPE
from megatron_nucleus.utils.errors import ConfigError

def look(settings):
    raise ConfigError("the shop is closed")

def read(settings):
    return open("/no/such/file").read()

@row_stage(check=look)
def closed(rows, settings):
    return [{} for _ in rows]

@row_stage(identity=read)
def unread(rows, settings):
    return [{} for _ in rows]

@row_stage(reads=("scores",), adds={"scores": pa.list_(SCORE_TYPE)})
def any_score(rows, settings):
    return [{"scores": row["scores"]} for row in rows]

class Scorer:
    name, revision, side_px = "mine", "1", 8
    def __init__(self, config): ...
    def score(self, pictures, captions): ...
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


@pytest.fixture
def source(tmp_path, photos):
    return write_captioned(tmp_path / "in", {"a.png": encode(photos["coffee.png"].resize((90, 80)))})


def assert_refused_first(source, tmp_path, monkeypatch, kind, message, *stages):
    """Curating with these stages after `inspect` fails so, before anything is done."""

    def no_work(*arguments):
        raise AssertionError("a stage ran")

    monkeypatch.setattr(runner, "run_stage", no_work)
    with pytest.raises(kind, match=message):
        curate(source, tmp_path / "out", make_settings(["inspect", *stages]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"score": {"as": "nice", "kind": "rating", "model": "image_statistics", "head": "nowhere.st"}},
            "^recipe.stages: nice: .*nowhere.st",
        ),
        (
            {"score": {"as": "fit", "kind": "alignment", **HUB}},
            r"^recipe.stages: fit: model_revision \(none\): a hub model needs the commit",
        ),
        (
            {"score": {"kind": "alignment", "model": "nowhere"}},
            "^recipe.stages: score: model nowhere: no such",
        ),
        ({"recaption": HTTP}, "^recipe.stages: recaption: api_key_env NO_SUCH_KEY: .* empty or missing"),
        (
            {"recaption": {"captioner": "transformers", **HUB}},
            "^recipe.stages: recaption: model owner/name: .*model_revision",
        ),
        (
            {"recaption": {"captioner": "OWN:Missing"}},
            "^recipe.stages: recaption: captioner .*has no Missing",
        ),
        ("OWN:closed", "^recipe.stages: closed: the shop is closed"),
        ("OWN:unread", "^recipe.stages: unread: .*No such file or directory: '/no/such/file'"),
    ],
)
def test_what_a_late_stage_lacks_is_said_first(source, tmp_path, monkeypatch, own, stage, message):
    if isinstance(stage, str):
        stage = stage.replace("OWN", own)
    elif stage.get("recaption", {}).get("captioner", "").startswith("OWN"):
        stage = {"recaption": {"captioner": f"{own}:Missing"}}
    assert_refused_first(source, tmp_path, monkeypatch, ConfigError, message, stage)


def test_a_damaged_head_is_said_first(source, tmp_path, monkeypatch):
    head = tmp_path / "head.safetensors"
    head.write_bytes(b"x" * 100)
    line = {"score": {"as": "nice", "kind": "rating", "model": "image_statistics", "head": str(head)}}
    assert_refused_first(
        source, tmp_path, monkeypatch, DataError, "^recipe.stages: nice: .*head.safetensors", line
    )


def test_with_the_key_in_the_environment_the_check_passes(monkeypatch):
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    lines = resolve(stages("inspect", {"recaption": HTTP}), {})
    assert list(recipe.versions(lines)) == ["inspect", "recaption"]


def stages(*entries):
    return RecipeConfig(StageList.from_plain(list(entries), "recipe.stages"))


STATISTICS = {"score": {"as": "quality", "kind": "image_statistics"}}


def test_a_score_that_no_stage_before_writes_is_refused(source, tmp_path, monkeypatch):
    wanted = {"tiers": {"tier_scorer": "qualty"}}
    message = (
        r"recipe.stages: tiers: tier_scorer qualty: no stage before it writes a score of that name "
        r"\(did you mean quality\?\) \(there is: quality\)"
    )
    assert_refused_first(source, tmp_path, monkeypatch, ConfigError, message, STATISTICS, wanted)
    after = {"tiers": {"tier_scorer": "quality"}}
    assert_refused_first(
        source,
        tmp_path,
        monkeypatch,
        ConfigError,
        r"tier_scorer quality: .*\(there is: none\)",
        after,
        STATISTICS,
    )


@pytest.mark.parametrize(
    "before",
    [
        [STATISTICS],
        [{"score": {"kind": "image_statistics", "metric": "quality"}}],
        ["OWN:any_score"],
        [{"score": {"kind": "OWN:Scorer"}}],
        [{"score": {"as": "quality", "kind": "OWN:Scorer"}}],
    ],
    ids=["as", "metric", "own stage", "own scorer", "own scorer with a name"],
)
def test_a_score_that_a_stage_before_writes_or_may_write_passes(own, before):
    def filled(entry):
        if isinstance(entry, str):
            return entry.replace("OWN", own)
        return {"score": {k: v.replace("OWN", own) for k, v in entry["score"].items()}}

    entries = ["inspect", *map(filled, before), {"tiers": {"tier_scorer": "quality"}}]
    assert len(resolve(stages(*entries), {})) == len(entries)


def test_an_own_scorer_with_another_name_does_not_pass(own):
    entries = [
        "inspect",
        {"score": {"as": "other", "kind": f"{own}:Scorer"}},
        {"tiers": {"tier_scorer": "mine"}},
    ]
    with pytest.raises(ConfigError, match=r"tier_scorer mine: .*\(there is: other\)"):
        resolve(stages(*entries), {})


def test_tiers_that_need_no_score_ask_for_none():
    assert len(resolve(stages("inspect", {"tiers": {"keep_untiered": True}}), {})) == 2
