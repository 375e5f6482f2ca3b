"""Recorded measurements: one entry per command and hardware, JSON and Markdown in step, nothing lost."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest
import torch

import megatron_nucleus
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
    assert set(facts) == {"command", "hardware", "threads", "versions", "commit"}
    assert {"megatron_nucleus", "torch", "python"} <= set(facts["versions"])
    assert facts["threads"] == torch.get_num_threads()
    assert "cores of" in facts["hardware"]


def test_libraries_that_may_have_run_are_named(monkeypatch):
    there = {"triton": "3.4", "flash-attn": "2.8"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert provenance(["tools/x.py"], "cpu")["versions"].items() >= there.items()


def test_other_threads_are_another_measurement(tmp_path):
    for threads in (1, 2, 1):
        record(tmp_path / "t.md", entry("a", threads) | {"threads": threads}, "Steps", values)
    assert [e["value"] for e in json.loads((tmp_path / "t.json").read_text())] == [1, 2]


def test_only_code_makes_a_tree_dirty(tmp_path, monkeypatch):
    """`make bench` records several measurements into the tree; the first must not make the second one dirty."""
    tree = tmp_path / "tree"
    for folder in ("megatron_nucleus", "benchmarks", "triton_ops"):
        (tree / folder).mkdir(parents=True)
    (tree / "megatron_nucleus" / "__init__.py").write_text("")
    (tree / "benchmarks" / "t.md").write_text("1")

    def git(*words: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *names, *words], cwd=tree, capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    monkeypatch.setattr(megatron_nucleus, "__file__", str(tree / "megatron_nucleus" / "__init__.py"))
    commit = git("rev-parse", "HEAD").strip()
    (tree / "benchmarks" / "t.md").write_text("2")
    assert provenance(["x"], "cpu")["commit"] == commit
    (tree / "triton_ops" / "new.py").write_text("")
    assert provenance(["x"], "cpu")["commit"] == f"{commit}-dirty"


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
    with pytest.raises(DataError, match=r"t\.json"):  # before anything is measured
        check_record(tmp_path / "t.md")


@pytest.mark.parametrize("title", ["Steps", "Operations"])
def test_files_of_others_are_never_written_to(tmp_path, title):
    path = tmp_path / "notes.md"
    path.write_text("# My notes\n")
    with pytest.raises(ConfigError, match="--record .*holds something else .'# My notes'"):
        record(path, entry("a", 1), title, values)
    assert path.read_text() == "# My notes\n"
    assert not (tmp_path / "notes.json").exists()


def test_two_programs_cannot_share_a_file(tmp_path):
    path = tmp_path / "t.md"
    record(path, entry("a", 1), "Steps", values)
    before = path.with_suffix(".json").read_text()
    for write in (
        lambda: check_record(path, "Operations"),
        lambda: record(path, entry("b", 2), "Operations", values),
    ):
        with pytest.raises(ConfigError, match="holds something else .'# Steps'"):
            write()
    assert path.with_suffix(".json").read_text() == before
    assert check_record(path, "Steps") == path


def test_a_table_that_cannot_be_made_changes_nothing(tmp_path):
    path = tmp_path / "t.md"
    record(path, entry("a", 1), "Steps", values)
    before = path.with_suffix(".json").read_text()
    with pytest.raises(KeyError):
        record(path, entry("b", 2), "Steps", lambda entries: entries[1]["missing"])
    assert path.with_suffix(".json").read_text() == before


def _record_some(path: Path, first: int) -> None:
    for number in range(first, first + 8):
        record(path, entry(f"c{number}", number), "Steps", values)


def test_processes_that_record_at_once_lose_nothing(tmp_path):
    processes = [multiprocessing.Process(target=_record_some, args=(tmp_path / "t.md", k)) for k in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    stored = json.loads((tmp_path / "t.json").read_text())
    assert sorted(e["value"] for e in stored) == [*range(8), *range(100, 108)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md"]


@pytest.mark.parametrize("name", ["t.txt", "missing/t.md"])
def test_a_bad_place_is_refused_before_anything_is_measured(tmp_path, name):
    with pytest.raises(ConfigError, match="--record"):
        check_record(tmp_path / name)
