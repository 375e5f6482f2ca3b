"""tools/curate.py as a program: the JSON line, exit codes, one-line errors, and going on after a signal."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.utils import cli

TOOL = Path(__file__).parents[2] / "tools" / "curate.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("curate_program", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(folder, count=6, side=40):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
        (folder / f"{i:05d}.png").write_bytes(buffer.getvalue())
        (folder / f"{i:05d}.txt").write_text(f"noise number {i}")
    return folder


def run(program, capsys, *arguments):
    """(exit code, stdout lines, stderr lines without progress bars)."""
    try:
        cli.run(lambda: program.main([str(a) for a in arguments]))
        code = 0
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    lines = [
        x
        for x in err.replace("\r", "\n").splitlines()
        if x.strip() and "img" not in x and "images/s" not in x
    ]
    return code, out.splitlines(), lines


def test_the_last_line_is_the_json_object(program, capsys, tmp_path):
    source = fill(tmp_path / "in")
    (source / "tiny.png").write_bytes((source / "00000.png").read_bytes()[:60])
    (source / "tiny.txt").write_text("x")
    arguments = (
        "--input",
        source,
        "--output",
        tmp_path / "out",
        "--min-side-px",
        40,
        "--workers",
        1,
        "--json",
    )
    code, out, err = run(program, capsys, *arguments)
    assert (code, err) == (0, [])
    result = json.loads(out[-1])
    assert (result["seen"], result["kept"], result["rejected"]) == (7, 6, {})
    assert result["quarantined"] == {"undecodable": 1}
    assert [Path(p).is_file() for p in result["shards"] + result["index"] + [result["report"]]] == [True] * 3
    assert result["images_per_s"] > 0
    code, out, _ = run(program, capsys, *arguments)
    assert code == 0
    assert "already complete" in out[0]
    assert json.loads(out[-1])["already_complete"]
    code, _, err = run(program, capsys, *arguments, "--max-side-px", 4000)
    assert (code, len(err)) == (2, 1)
    assert "recipe[0].settings.max_side_px: 8096 there, 4000 here); --update makes again" in err[0]
    code, out, err = run(program, capsys, *arguments, "--max-side-px", 4000, "--update")
    assert (code, err) == (0, [])
    assert (json.loads(out[-1])["kept"], json.loads(out[-1])["already_complete"]) == (6, False)


def test_a_config_file_and_flags_on_top(program, capsys, tmp_path):
    source = fill(tmp_path / "in")
    config = tmp_path / "c.yaml"
    config.write_text("inspect: {min_side_px: 99}\ncuration: {source: noise}\nengine: {workers: 1}\n")
    common = ("--input", source, "--output", tmp_path / "out", "--config", config)
    code, _, err = run(program, capsys, *common)
    assert code == 3
    assert len(err) == 1
    assert "none of 6 items can be used (6 too_small)" in err[0]
    code, _, _ = run(program, capsys, *common, "--min-side-px", 10)
    assert code == 0
    assert open_corpus(tmp_path / "out").read(0).info["source"] == "noise"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "IN", "--output", "OUT", "--min-side", "3"], 2, "did you mean --min-side-px"),
        (["--input", "IN", "--output", "OUT", "--min-side-px", "many"], 2, "--min-side-px: expected a whole number"),
        (["--input", "IN", "--output", "OUT", "--engine", "dask"], 2, "'dask' is not allowed"),
        (["--input", "IN", "--output", "OUT", "--workers", "-1"], 2, "--workers -1"),
        (["--input", "IN", "--output", "OUT", "--config", "MISSING"], 2, "no such file"),
        (["--input", "IN", "--output", "OUT", "--config", "BADKEY"], 2, "did you mean min_side_px"),
        (["--output", "OUT"], 2, "--input"),
        (["--input", "MISSING", "--output", "OUT"], 2, "no such folder"),
        (["--input", "EMPTY", "--output", "OUT"], 3, "no images and no .tar files"),
        (["--input", "BARE", "--output", "OUT"], 3, "put NAME.txt"),
        (["--input", "IN", "--output", "IN"], 2, "must lie beside --input"),
        (["--input", "IN", "--output", "BARE"], 2, "not empty"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_the_documented_code(program, capsys, tmp_path, arguments, code, message):
    fill(tmp_path / "IN", 1)
    (tmp_path / "EMPTY").mkdir()
    fill(tmp_path / "BARE", 2)
    for path in (tmp_path / "BARE").glob("*.txt"):
        path.unlink()
    (tmp_path / "BADKEY").write_text("inspect: {min_side: 3}\n")
    names = {p.name for p in tmp_path.iterdir()} | {"OUT", "MISSING"}
    got, _, err = run(program, capsys, *(tmp_path / a if a in names else a for a in arguments))
    assert got == code
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert message in err[0]
    assert not (tmp_path / "OUT" / "manifest.json").exists()


def test_a_signal_stops_with_code_4_and_the_same_command_finishes(tmp_path):
    source = fill(tmp_path / "in", count=2100, side=48)
    command = [sys.executable, str(TOOL), "--input", str(source), "--output", str(tmp_path / "out"),
               "--min-side-px", "32", "--workers", "2", "--json"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    finished = tmp_path / "out" / "stages" / "01-inspect"
    while process.poll() is None and not list(finished.glob("*/_SUCCESS.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert err.strip().splitlines()[-1].endswith("the same command goes on from here")
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    first = {p: p.stat().st_mtime_ns for p in finished.glob("*/_SUCCESS.json")}
    assert first
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert (result["seen"], result["kept"]) == (2100, 2100)
    assert first.items() <= {p: p.stat().st_mtime_ns for p in finished.glob("*/_SUCCESS.json")}.items()
    assert len(open_corpus(tmp_path / "out")) == 2100
