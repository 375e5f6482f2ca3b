"""tools/tune_ops.py: what it would tune, and that it says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.utils.errors import ConfigError
from tools import tune_ops

ROOT = Path(__file__).resolve().parents[2]


def test_muons_matrices_are_those_of_the_published_widths():
    """Attention, text, experts (gate and up apart), dense feed-forward of 5376, and time embedding under AdamW."""
    shapes = tune_ops.orthogonalised(PRESETS["nucleus_image_17b"])
    assert shapes == {(2048, 2048), (512, 2048), (2048, 4096), (1344, 2048), (2048, 5376)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/tune_ops.py")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: tools/tune_ops.py needs an NVIDIA GPU, none is visible"


def test_sizes_are_checked():
    with pytest.raises(ConfigError, match="--rows 0: must be at least 1"):
        tune_ops.main(["--rows", "0"])
    with pytest.raises(ConfigError, match="--experts -1: must be at least 1"):
        tune_ops.main(["--experts", "-1"])


@pytest.mark.gpu
def test_a_small_model_is_tuned_and_its_file_read_back(tmp_path, monkeypatch):
    from triton_ops import tuning

    path = tmp_path / f"{tuning.hardware_name(torch.device('cuda'))}.json"
    written = tune_ops.tune(PRESETS["demo"], [64], 2, str(path))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    table = tuning.table(path.stem)
    tuning.table.cache_clear()
    assert {op: set(classes) for op, classes in table.items()} == {
        o: set(c) for o, c in written["tiles"].items()
    }
    assert set(table) == {"expert_ffn", "swiglu", "symmetric_product"}
