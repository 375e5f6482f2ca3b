"""tools/curate.py killed with SIGKILL again and again: the end is that of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.data.curation.helpers import files_of
from tests.support import ROOT

SMALL_PARTS = """
import sys
sys.path.insert(0, "tools")
from megatron_nucleus.data.curation import readers
readers.FILES_PER_TASK = 20
import curate
curate.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """160 pictures, some of them copies or damaged."""
    folder = tmp_path_factory.mktemp("kill") / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(160):
        pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((96, 80), 0))
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
        if i % 16 == 5:
            (folder / f"{i:03d}.png").write_bytes((folder / f"{i - 1:03d}.png").read_bytes())
        if i % 16 == 9:
            os.truncate(folder / f"{i:03d}.png", 100)
    return folder


def start(source, output):
    command = [sys.executable, "-c", SMALL_PARTS, "--input", str(source), "--output", str(output)]
    command += ["--min-side-px", "64", "--workers", "2", "--max-shard-bytes", "20000"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished_parts(output):
    return sum(1 for _ in (output / "stages").glob("*/*/_SUCCESS.json"))


def test_killed_at_every_stage_and_gone_on(source, tmp_path):
    clean, output = tmp_path / "clean", tmp_path / "out"
    process = start(source, clean)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    whole = finished_parts(clean)
    kills = 0
    for goal in np.linspace(1, whole - 1, 6).astype(int).tolist():
        process = start(source, output)
        while process.poll() is None and finished_parts(output) < goal:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        assert not (output / "manifest.json").exists() or process.returncode == 0
    assert kills >= 4
    process = start(source, output)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert files_of(output) == files_of(clean)
