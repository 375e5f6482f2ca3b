"""Recipes: lines in YAML, checked before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_nucleus.data.curation import recipe
from megatron_nucleus.data.curation.recipe import BUILT_IN, RecipeConfig, StageList, load_stage, resolve
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.curation.stage import Drop
from megatron_nucleus.data.curation.stages.blank import BlankConfig
from megatron_nucleus.utils.config import to_dict
from megatron_nucleus.utils.errors import ConfigError

TOYS = str(Path(__file__).with_name("toy_stages.py"))
PORTRAITS = '''
import dataclasses
from megatron_nucleus.data.curation.stage import Drop, row_stage
from megatron_nucleus.utils.config import knob

@dataclasses.dataclass(frozen=True)
class Portraits:
    """Which portraits are kept."""

    max_height_over_width: float = knob(1.8, "taller images are rejected")

@row_stage(Portraits, reads=("width_px", "height_px"), rejects=("tall_portrait",))
def portraits(rows, config):
    return [
        Drop("tall_portrait") if row["height_px"] > config.max_height_over_width * row["width_px"] else {}
        for row in rows
    ]
'''


def stages(*entries):
    return RecipeConfig(StageList.from_plain(list(entries), "recipe.stages"))


def names(lines):
    return [line.name for line in lines]


def test_the_default_recipe_resolves_and_every_built_in_stage_loads():
    lines = resolve(RecipeConfig(), Settings().stage_sections())
    assert names(lines) == [
        "inspect", "exact_duplicates", "blank", "blur", "near_duplicates", "image_statistics", "tiers",
    ]  # fmt: skip
    for name, spec in BUILT_IN.items():
        stage = load_stage(spec)
        assert stage.name == name
        assert stage.function.__doc__
        assert dataclasses.is_dataclass(stage.settings)


def test_a_stage_of_ones_own_takes_its_settings_from_the_line(tmp_path):
    path = tmp_path / "my_stages.py"
    path.write_text(PORTRAITS)
    lines = resolve(stages("inspect", {f"{path}:portraits": {"max_height_over_width": 1.5}}), {})
    stage, settings = lines[1].load()
    assert (names(lines), lines[1].spec) == (["inspect", "portraits"], f"{path}:portraits")
    assert settings.max_height_over_width == 1.5
    rows = [{"width_px": 10, "height_px": 14}, {"width_px": 10, "height_px": 16}]
    assert stage.function(rows, settings) == [{}, Drop("tall_portrait")]
    # Its version follows its settings.
    other = resolve(stages("inspect", f"{path}:portraits"), {})[1]
    assert other.load()[1].max_height_over_width == 1.8
    assert other.load()[0].version(other.load()[1]) != stage.version(settings)


def test_settings_come_from_the_section_and_the_line_and_as_gives_another_name():
    field, other = (f.name for f in dataclasses.fields(BlankConfig)[:2])
    value = getattr(BlankConfig(), field) / 2
    section = dataclasses.replace(BlankConfig(), **{field: value})
    lines = resolve(stages("inspect", "blank", {"blank": {"as": "again", other: 1.0}}), {"blank": section})
    assert names(lines) == ["inspect", "blank", "again"]
    assert [getattr(line.load()[1], field) for line in lines[1:]] == [value, value]
    assert [getattr(line.load()[1], other) for line in lines[1:]] == [getattr(BlankConfig(), other), 1.0]


def test_a_setting_that_section_and_line_both_give_is_refused():
    field = dataclasses.fields(BlankConfig)[0].name
    section = dataclasses.replace(BlankConfig(), **{field: 1.0})
    with pytest.raises(ConfigError, match=rf"blank: {field} is given in the recipe's line \(2.0\) and by --"):
        resolve(stages("inspect", {"blank": {field: 2.0}}), {"blank": section})


def test_plain_form_and_back():
    plain = ["inspect", {"score": {"as": "a", "kind": "image_statistics"}}, f"{TOYS}:double"]
    assert StageList.from_plain(plain, "x").to_plain() == plain
    assert to_dict(RecipeConfig())["stages"] == recipe.DEFAULT_STAGES.to_plain()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["inspct"], r"recipe.stages: inspct: unknown stage \(did you mean inspect\?\); one of inspect, "),
        (["inspect", "inspect"], "a second stage named inspect; give one another name with 'as'"),
        (["blank"], r"blank reads column \w+, which no stage before it writes; inspect does"),
        (["inspect", {"blank": {"minimum": 3}}], "recipe.stages: blank: unknown key 'minimum'"),
        (["inspect", {"blank": {"as": "a b"}}], r"recipe.stages\[1\]: as: 'a b' is not a plain name"),
        (["inspect", {"blank": 3}], r"recipe.stages\[1\]: expected"),
        (["inspect", {"blank": {}, "blur": {}}], r"recipe.stages\[1\]: expected NAME or"),
        ([], r"recipe.stages: expected a list of stages, got \[\]"),
        (["inspect", "nowhere.py:f"], "nowhere.py: no such file"),
        (["inspect", "nowhere.at.all:f"], "ModuleNotFoundError"),
        (
            ["inspect", f"{TOYS}:not_a_stage"],
            r"not_a_stage is no stage .* has double, widths, wrong_columns, ",
        ),
        ([f"{TOYS}:double"], "double reads column value, which no stage before it writes"),
        (["inspect", {f"{TOYS}:double": {"factor": 0}}], "double: factor 0: at least 1"),
        (
            ["inspect", {f"{TOYS}:double": {"factor": "x"}}],
            r"double.factor: expected a whole number, got 'x'",
        ),
    ],
)
def test_bad_recipes_name_the_line(entries, message):
    with pytest.raises(ConfigError, match=message):
        resolve(stages(*entries), Settings().stage_sections())


def test_a_recipe_that_writes_no_index_columns_is_refused(tmp_path):
    path = tmp_path / "lonely.py"
    path.write_text(
        "from megatron_nucleus.data.curation.stage import row_stage\n"
        "@row_stage(reads=('item',))\ndef lonely(rows, config):\n    return [{} for _ in rows]\n"
    )
    with pytest.raises(ConfigError, match=r"no stage writes column id, which the index needs; inspect does"):
        resolve(stages(f"{path}:lonely"), {})


def test_a_file_that_does_not_import_is_named(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import numpy\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py:f: ZeroDivisionError: division by zero"):
        resolve(stages("inspect", f"{path}:f"), {})


@pytest.mark.parametrize(
    ("adds", "message"),
    [
        ("{'container': pa.binary()}", "bad writes column container, which is not a stage's to write"),
        ("{'position': pa.int32()}", "bad writes column position, which is not a stage's to write"),
        ("{'captions': pa.string()}", r"bad writes column captions as string, it must be list<"),
        ("{'tier': pa.int8()}", "bad writes column tier as int8, it must be string"),
        ("{'phash': pa.binary()}", "bad writes column phash as binary, it must be uint64"),
    ],
)
def test_a_stage_may_not_write_what_others_rely_on(tmp_path, adds, message):
    path = tmp_path / "bad.py"
    path.write_text(
        "import pyarrow as pa\nfrom megatron_nucleus.data.curation.stage import row_stage\n"
        f"@row_stage(adds={adds})\ndef bad(rows, config):\n    return []\n"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(stages("inspect", f"{path}:bad"), {})


def test_a_batch_of_no_rows_is_refused(tmp_path):
    path = tmp_path / "none.py"
    path.write_text(
        "from megatron_nucleus.data.curation.stage import row_stage\n"
        "@row_stage(batch_rows=0)\ndef none(rows, config):\n    return []\n"
    )
    with pytest.raises(ConfigError, match="ValueError: batch_rows 0: at least 1"):
        resolve(stages("inspect", f"{path}:none"), {})
