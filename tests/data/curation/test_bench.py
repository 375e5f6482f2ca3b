"""What the benchmark of curation measures: the first stage's ratio, packing alone, stages without their models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_nucleus.data.curation import bench, bench_models
from megatron_nucleus.data.curation.engines import EngineConfig
from megatron_nucleus.data.curation.pipeline import STAGES, curate
from megatron_nucleus.data.curation.settings import CurationConfig, Settings
from megatron_nucleus.data.index import INDEX_SCHEMA
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.helpers import encode, files_of, make_settings, table, write_captioned


@pytest.fixture(scope="module")
def pictures(photos):
    names = ("astronaut.png", "chelsea.png", "coffee.png")
    return {
        f"{number}.jpg": encode(photos[name].convert("RGB"), "JPEG", quality=90)
        for number, name in enumerate(names)
    }


def test_ratio_and_rates_come_from_the_same_medians(pictures, monkeypatch):
    """Two batches of one file, three rounds; the third is disturbed and counts nowhere."""
    stand_in = SimpleNamespace(batch_rows=1, function=lambda rows, config: [{} for _ in rows])
    monkeypatch.setattr(bench, "inspect", stand_in)
    bare_then_stage_s = [1, 1.5, 3, 3.5] * 2 + [50, 9, 7, 90]
    ticks, now_s = [], 0.0
    for duration_s in bare_then_stage_s:
        ticks += [now_s, now_s + duration_s]
        now_s += duration_s
    got = bench.inspect_ratio(list(pictures.values())[:2], rounds=3, clock=iter(ticks).__next__)
    assert (got["files"], got["rounds"]) == (2, 3)
    assert got["bare_images_per_s"] == 2 / (1 + 3)
    assert got["inspect_images_per_s"] == 2 / (1.5 + 3.5)
    assert got["ratio"] == 1.25 == got["bare_images_per_s"] / got["inspect_images_per_s"]
    with pytest.raises(ConfigError, match="rounds 0; at least 1"):
        bench.inspect_ratio(list(pictures.values()), rounds=0)


def test_packing_again_writes_the_same_shards_and_leaves_the_data_set(pictures, tmp_path):
    source = write_captioned(tmp_path / "in", pictures)
    settings = Settings(engine=EngineConfig(workers=1), curation=CurationConfig(min_bucket_images=8))
    result = curate(source, tmp_path / "out", settings)
    before = files_of(tmp_path / "out")
    got = bench.pack_again(source, tmp_path / "out", tmp_path / "again", workers=1)
    assert result["kept"] == got["images"] == 3
    first, second = files_of(tmp_path / "out" / "shards"), files_of(tmp_path / "again" / "shards")
    assert first == second
    assert got["bytes"] == sum(map(len, second.values())) > 3 * 512
    assert got["wall_s"] > 0
    assert files_of(tmp_path / "out") == before
    assert (tmp_path / "again" / STAGES).is_dir()


def test_stages_with_stand_ins_score_and_describe_every_image(pictures, tmp_path):
    source = write_captioned(tmp_path / "in", pictures)
    model = bench_models.write_siglip(tmp_path / "model")
    result = curate(source, tmp_path / "out", make_settings(bench_models.stages(model)))
    assert result["kept"] == 3
    assert [s["stage"] for s in result["stages"]][-2:] == ["alignment", "recaption"]
    assert [s["in"] for s in result["stages"]][-2:] == [3, 3]
    for row in table(tmp_path / "out" / "index", INDEX_SCHEMA):
        *new, original = row["captions"]
        assert [c["text"] for c in new] == [
            "a short stand-in for a caption",
            "a medium stand-in for a caption",
            "a detailed stand-in for a caption",
        ]
        assert {c["source"] for c in new} == {"synthetic"}
        assert {(c["model"], c["model_revision"]) for c in new} == {("instant", "1")}
        assert original["text"].startswith("a picture called")
        assert 0.26 < original["alignment"] < 0.74
        (score,) = row["scores"]
        assert score["scorer"] == "alignment"
        assert score["value"] == original["alignment"]
