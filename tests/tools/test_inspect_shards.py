"""tools/inspect_shards.py as a program: what it prints, the JSON line, the sheet, exit codes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_nucleus.inference.grid import CELL_PX, GAP_PX
from megatron_nucleus.utils import cli
from tests.data.corpora import make_encoded
from tests.data.lookup_sets import make

TOOL = Path(__file__).parents[2] / "tools" / "inspect_shards.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("inspect_shards_program", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "set"
    return folder, make(folder)


@pytest.fixture
def run(program, capsys):
    def call(*arguments):
        """(exit code, stdout, stderr)."""
        try:
            cli.run(lambda: program.main([str(a) for a in arguments]))
            code = 0
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def test_the_summary(run, made):
    folder, _ = made
    code, out, _ = run(folder, "--json")
    lines = out.splitlines()
    tars = sorted((folder / "shards").glob("*.tar"))
    size = sum(t.stat().st_size for t in tars)
    assert code == 0
    assert lines[0] == f"30 samples (images), {len(tars)} shards, {size:,} bytes"
    assert "tiers: A1 10, A2 10, none 10" in lines
    assert "index: all 30 rows point at their samples" in lines
    result = json.loads(lines[-1])
    assert (result["samples"], result["bytes"], result["captions"], result["run"]) == (
        30, size, 36, {"seen": 30, "kept": 30}
    )  # fmt: skip


def test_verify(run, made, tmp_path):
    folder, _ = made
    code, out, _ = run(folder, "--verify")
    assert code == 0
    assert "all as the manifest says; 30 rows point at their samples" in out
    broken = shutil.copytree(folder, tmp_path / "broken")
    victim = sorted((broken / "shards").glob("*.tar"))[-1]
    data = bytearray(victim.read_bytes())
    data[700] ^= 1
    victim.write_bytes(bytes(data))
    code, out, err = run(broken, "--verify")
    assert (code, out) == (3, "")
    assert f"shards/{victim.name} is not what the manifest says" in err


def test_the_sheet(run, made, tmp_path):
    code, out, _ = run(made[0], "--sheet", tmp_path / "s.png", "--bucket", "1344x768", "--count", 3, "--json")
    assert code == 0
    ids = json.loads(out.splitlines()[-1])["ids"]
    by_id = {row["id"]: row for row in made[1]}
    assert [by_id[i]["aspect_bucket"] for i in ids] == ["1344x768"] * 3
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 2 * CELL_PX + 3 * GAP_PX
        assert len(sheet.convert("RGB").resize((64, 64)).getcolors(4096)) > 100  # noise, not paper
    again = run(made[0], "--sheet", tmp_path / "t.png", "--bucket", "1344x768", "--count", 3)
    assert again[0] == 0
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()


def test_by_id_with_extraction(run, made, tmp_path):
    row = made[1][5]
    code, out, _ = run(made[0], "--id", row["id"][:16], "--extract", tmp_path / "x", "--json")
    assert code == 0
    assert out.splitlines()[0] == row["id"]
    for words in (
        "source_id in/5.png", "licence CC0-1.0", "caption (short, web): a Red house number 5", "score s 0.5 (s@1)",
        "1 found",
    ):  # fmt: skip
        assert words in out
    result = json.loads(out.splitlines()[-1])
    assert result["rows"][0]["captions"][1]["text"] == "THE sea, 100 % blue"
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [f"{row['id']}.json", f"{row['id']}.png"]


def test_by_text_says_what_it_leaves_out(run, made):
    code, out, _ = run("--limit", 2, "--text", "green  house", made[0])  # the folder may stand last
    assert code == 0
    assert out.splitlines()[-1] == "24 found, 2 shown (--limit)"


@pytest.mark.parametrize("wanted", ["ffffffffff", "gone.png"])
def test_an_image_that_was_not_kept_is_explained(run, made, wanted):
    code, out, _ = run(made[0], "--id", wanted, "--json")
    assert code == 0
    assert f"not kept: {'f' * 64} gone.png, 80 x 60 px: rejected by blur, blurry (not sharp)" in out
    assert "0 found, 1 not kept" in out.splitlines()
    result = json.loads(out.splitlines()[-1])
    assert (result["found"], result["found_not_kept"], result["not_kept"][0]["reason"]) == (0, 1, "blurry")


def test_kept_and_other_images_of_one_name(run, made):
    code, out, _ = run(made[0], "--id", "3.png", "--limit", 1)
    assert code == 0
    assert out.splitlines()[0] == made[1][3]["id"]
    assert "not kept: content unknown other/3.png: quarantined by inspect, undecodable (cut)" in out
    assert out.splitlines()[-1] == "1 found, 2 not kept, 1 shown (--limit)"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--id", "xyz"], 2, "--id xyz: no image of"),
        (["--id", ""], 2, "--id: give the beginning of an id"),
        (["--text", ""], 2, "--text: no word"),
        (["--text", "red", "house"], 2, "unknown argument house"),
        (["--sheet", ""], 2, "give a name that ends in .png"),
        (["--sheet", "no such/s.png"], 2, "--sheet no such/s.png: no such folder no such; create it first"),
        (["--sheet", f"{__file__}/s.png"], 2, f"--sheet {__file__}: {__file__} is a file"),
        (
            ["--id", "a", "--extract", __file__],
            2,
            f"--extract {__file__}: {__file__} is a file; name a new folder",
        ),
        (["--tier", "A1"], 2, "--tier belongs to --sheet FILE"),
        (["--extract", "x"], 2, "--extract belongs to --id and --text"),
        (["--sheet", "s.png", "--count", "0"], 2, "--count 0: 1 to 400"),
        (["--sheet", "s.jpg"], 2, "give a name that ends in .png"),
        (["--verify", "--id", "a"], 2, "not allowed with"),
        (["--id", "a", "--limit", "0"], 2, "--limit 0: at least 1"),
    ],
)
def test_wrong_requests(run, made, arguments, code, message):
    found, out, err = run(made[0], *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_encoded_data_and_folders_that_are_none(run, tmp_path):
    make_encoded(tmp_path / "encoded", 4)
    code, out, _ = run(tmp_path / "encoded")
    assert code == 0
    assert out.startswith("4 samples (latents and text features)")
    code, _, err = run(tmp_path / "encoded", "--sheet", tmp_path / "s.png")
    assert code == 2
    assert "no pictures; give the data set it was encoded from" in err
    for path, message in (
        (tmp_path, "holds no manifest.json"),
        (tmp_path / "encoded" / "manifest.json", "a file"),
    ):
        code, _, err = run(path)
        assert code == 2
        assert f"{path}: {message}" in err
