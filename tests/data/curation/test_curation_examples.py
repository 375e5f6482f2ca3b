"""The recipes and stages in examples/: they resolve, and the stages of one's own do what they say."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.recipe import DEFAULT_STAGES, levels, resolve
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.curation.store import Store
from megatron_nucleus.utils.config import from_dict
from megatron_nucleus.utils.config_files import read_yaml
from tests.data.curation.helpers import encode, make_settings, write_captioned
from tests.support import ROOT

CONFIGS = [
    *sorted((ROOT / "examples" / "curation").glob("*.yaml")),
    ROOT / "examples" / "scenes" / "curate.yaml",
]


def load(path):
    values, origins = read_yaml(path)
    settings = from_dict(Settings, values, where=str(path), origins=origins)
    return settings, resolve(settings.recipe, settings.stage_sections())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_is_a_recipe_that_can_run(path):
    settings, lines = load(path)
    assert lines[0].name == "inspect"
    assert len(levels(lines)) == len(lines) + 1
    assert len(settings.recipe.stages.lines) == len(lines)


def test_the_default_recipe_is_written_out_as_it_is():
    settings, lines = load(ROOT / "examples" / "curation" / "default.yaml")
    assert settings.recipe.stages == DEFAULT_STAGES
    default = Settings()
    assert lines == resolve(default.recipe, default.stage_sections())


def test_the_published_recipe_has_the_published_thresholds():
    _, lines = load(ROOT / "examples" / "curation" / "published.yaml")
    settings = {line.name: line.load()[1] for line in lines}
    assert settings["aesthetic"].kind == "aesthetic"
    assert (settings["tiers"].tier_by, settings["tiers"].tier_edges) == (
        "thresholds",
        (5.0, 5.5, 6.0, 6.5, 6.8),
    )
    assert settings["near_duplicates"].near_max_bits == 4
    assert (settings["inspect"].min_side_px, settings["inspect"].max_side_px) == (256, 8096)


def test_stages_of_ones_own(tmp_path, photos):
    cat = photos["chelsea.png"].convert("RGB").resize((90, 80))
    blue = cat.copy()
    blue.putdata([(b, g, r) for r, g, b in cat.getdata()])
    pictures = {"cat.png": encode(cat), "blue.png": encode(blue), "tall.png": encode(cat.resize((70, 120)))}
    source = write_captioned(tmp_path / "in", pictures)
    own = "examples/curation/my_stages.py"
    stages = ["inspect", {f"{own}:portraits": {"max_height_over_width": 1.5}}, f"{own}:warmth"]
    settings = make_settings(stages)
    result = curate(source, tmp_path / "out", settings)
    assert (result["kept"], result["rejected"]) == (2, {"tall_portrait": 1})
    lines = resolve(settings.recipe, settings.stage_sections())
    store = Store(str(tmp_path / "out" / "stages"), levels(lines))
    rows = store.read(3, "files-000000", ["item", "warmth"]).to_pylist()
    pixels = np.asarray(cat, np.float64).mean((0, 1)) / 255
    warmth = {row["item"]: row["warmth"] for row in rows}
    assert warmth["cat.png"] == pytest.approx(pixels[0] - pixels[2], abs=1e-6)
    assert warmth["blue.png"] == pytest.approx(pixels[2] - pixels[0], abs=1e-6)
    assert "warmth" in (tmp_path / "out" / "report.html").read_text()
