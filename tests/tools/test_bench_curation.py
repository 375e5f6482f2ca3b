"""tools/bench_curation.py: a whole small run with its report, and that the report's figures agree with one another."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_nucleus.utils.errors import ConfigError
from tools import bench_curation


def in_this_process(command, json_flag=True):
    """`bench_curation._program` without starting Python anew."""
    program = importlib.import_module(f"tools.{Path(command[0]).stem}")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program.main([*command[1:], *(["--json"] if json_flag else [])])
    return json.loads(out.getvalue().splitlines()[-1]) if json_flag else {}


def rows_of(text: str) -> dict[str, list[float]]:
    """Stage -> images in, kept, wall s, images/s, images/s per core, of all tables of a report."""
    rows = re.findall(r"^\| (\w+) \| ([\d.,|\s]+) \|$", text, re.MULTILINE)
    return {name: [float(cell.replace(",", "")) for cell in cells.split("|")] for name, cells in rows}


@pytest.fixture
def photos_folder(tmp_path):
    package = pytest.importorskip("skimage")
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(Path(package.__file__).parent / "data" / "coffee.png", folder)
    return folder


def test_a_small_run(photos_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_curation, "_program", in_this_process)
    monkeypatch.setattr(bench_curation, "ROUNDS", 1)
    report, work = tmp_path / "curation.md", tmp_path / "work"
    words = ["--count", "24", "--photos", str(photos_folder), "--work", str(work), "--workers", "1"]
    bench_curation.main([*words, "--report", str(report), "--json"])
    figures = json.loads(report.with_suffix(".json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    curated, packed = figures["curate"], figures["pack"]
    assert curated["seen"] == 24
    assert 0 < packed["images"] == curated["kept"]
    assert packed["bytes"] == sum(path.stat().st_size for path in (work / "out").rglob("*.tar"))
    text, rows = report.read_text(), rows_of(report.read_text())
    assert list(rows) == [
        *(stage["stage"] for stage in curated["stages"]),
        "pack",
        "alignment",
        "recaption",
    ]
    assert rows["list"][:2] == [24, 24]
    assert rows["pack"][:2] == [curated["kept"]] * 2
    assert rows["alignment"][0] == rows["recaption"][0] == rows["recaption"][1] > 0
    ratio = figures["inspect_over_bare_decode"]
    assert ratio["ratio"] == pytest.approx(ratio["bare_images_per_s"] / ratio["inspect_images_per_s"])
    assert f"took {ratio['ratio']:.2f} times as long" in text
    assert not (work / "packed").exists()
    assert (work / "corpus-24-0").is_dir()


def test_a_missing_package_is_named_before_the_work(photos_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_curation.bench_models, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ConfigError, match="install no_such_package$"):
        bench_curation.main(["--photos", str(photos_folder), "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_one_core_counts_for_stages_that_see_all_rows():
    stage = {"in": 1200, "kept": 900, "wall_s": 2.0, "images_per_s": 600.0}
    assert (
        bench_curation.stage_line({"stage": "blur", **stage}, 3) == "| blur | 1,200 | 900 | 2.0 | 600 | 200 |"
    )
    assert (
        bench_curation.stage_line({"stage": "tiers", **stage}, 3)
        == "| tiers | 1,200 | 900 | 2.0 | 600 | 600 |"
    )
