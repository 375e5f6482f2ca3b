"""Recorded measurements: one entry per command and hardware, JSON and Markdown in step, nothing lost."""

from __future__ import annotations

import json

import pytest

from megatron_nucleus.training.benchmark.record import check_record, command, provenance, record, where
from megatron_nucleus.utils.errors import ConfigError, DataError


def entry(words: str, value: int, hardware: str = "a machine") -> dict:
    versions = {"torch": "2.13.0"}
    return {
        "command": words,
        "hardware": hardware,
        "versions": versions,
        "commit": "0123456789abcdef",
        "value": value,
    }


def values(entries: list[dict]) -> str:
    return " ".join(str(e["value"]) for e in entries)


def test_a_second_measurement_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "train.md"
    for one in (entry("a", 1), entry("b", 2), entry("a", 3, "another machine"), entry("a", 4)):
        record(path, one, "Steps", values)
    stored = json.loads((tmp_path / "train.json").read_text())
    assert [e["value"] for e in stored] == [4, 2, 3]
    assert path.read_text() == "# Steps\n\n4 2 3\n\nCommands, by number:\n\n1. `a`\n2. `b`\n3. `a`\n"


def test_what_does_not_change_a_measurement_is_no_part_of_its_command():
    words = [
        "tools/x.py",
        "--record",
        "b/t.md",
        "--steps",
        "3",
        "--json",
        "--record=c.md",
        "--name",
        "two words",
    ]
    assert command(words) == "tools/x.py --steps 3 --name 'two words'"


def test_provenance_names_what_figures_depend_on():
    facts = provenance(["tools/x.py"], "cpu")
    assert set(facts) == {"command", "hardware", "versions", "commit"}
    assert set(facts["versions"]) == {"megatron_nucleus", "torch", "python"}
    assert "cores of" in facts["hardware"]


def test_a_changed_tree_shows_in_the_table():
    assert where(entry("a", 1)) == "a machine | 2.13.0 | 0123456789"
    assert where(entry("a", 1) | {"commit": "0123456789abcdef-dirty"}).endswith("0123456789-dirty")
    assert where(entry("a", 1) | {"commit": None}).endswith("| none")


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"value": 1}]', "[3]"])
def test_a_damaged_file_is_named_and_kept(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match="t.json"):
        record(tmp_path / "t.md", entry("a", 1), "T", values)
    assert (tmp_path / "t.json").read_text() == text
    assert not (tmp_path / "t.md").exists()


@pytest.mark.parametrize("name", ["t.txt", "missing/t.md"])
def test_a_bad_place_is_refused_before_anything_is_measured(tmp_path, name):
    with pytest.raises(ConfigError, match="--record"):
        check_record(tmp_path / name)
