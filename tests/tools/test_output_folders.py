"""An output folder that cannot be written, or a disk that is full, is one line and an exit code in every program."""

from __future__ import annotations

import importlib
import json
import resource

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.export import native
from megatron_nucleus.utils import cli
from tests.data.curation.helpers import make_settings

SHAPE = ModelShape(
    num_layers=1, num_attention_heads=2, attention_head_dim=16, num_key_value_heads=1, text_dim=256,
    latent_channels=16, patch_size=2, axes_dims_rope=(4, 6, 6), mlp_ratio=8.0,
    dense_moe_strategy="all_moe", num_experts=2, moe_intermediate_dim=16, capacity_factors=(1.0,),
    use_sigmoid=False, route_scale=1.0,
)  # fmt: skip
LIMIT_BYTES = 2000  # of one file: smaller than any that the programs write whole


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with images/, curated/ and run/."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"noise {i}")
    curate(root / "images", root / "curated", make_settings(min_side_px=32))
    step = root / "run" / "checkpoints" / "step_00000003"
    (step / "model").mkdir(parents=True)
    save_file(NucleusTransformer(SHAPE).state_dict(), step / "model" / "model.safetensors")
    encoders = EncoderConfig()
    state = {
        "format": 1,
        "step": 3,
        "model": native.shape_to_dict(SHAPE),
        "codec": encoders.codec_spec(),
        "text_encoder": encoders.text_spec(),
        "sampling": {"steps": 1, "guidance": 1.0, "shift": 1.0, "height": 32, "width": 32},
    }
    (step / "state.json").write_text(json.dumps(state))
    native.write_manifest(step, native.describe_files(step))
    native.set_latest(step.parent, step)
    return root


PROGRAMS = {
    "curate": ["--input", "{root}/images", "--min-side-px", "32", "--workers", "1"],
    "make_scenes": ["--count", "3"],
    "encode": [
        "--data-path",
        "{root}/curated",
        "--resolution-px",
        "32",
        "--device",
        "cpu",
        "--num-workers",
        "0",
    ],
    "sample": ["--checkpoint", "{root}/run", "--prompt", "a red circle", "--device", "cpu"],
    "convert_checkpoint": ["--input", "{root}/run", "--to", "hf"],
    "merge_checkpoints": ["--checkpoints", "{root}/run", "--last", "1"],
}


def call(program, inputs, output, capsys) -> tuple[int, list[str]]:
    """Exit code, and the lines on stderr but those of progress bars."""
    module = importlib.import_module(f"tools.{program}")
    arguments = [a.format(root=inputs) for a in PROGRAMS[program]] + ["--output", str(output)]
    capsys.readouterr()
    try:
        cli.run(lambda: module.main(arguments))
    except SystemExit as stop:
        return stop.code, [
            x for x in capsys.readouterr().err.splitlines() if x.startswith(("error", "Trace"))
        ]
    return 0, []


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_output_below_a_regular_file(program, inputs, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file / "sub", file / "sub" / "deeper", file):
        code, lines = call(program, inputs, output, capsys)
        assert code == 2
        assert lines == [f"error: --output {output}: {file} is a file; name a new folder"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_name_that_the_file_system_refuses(program, inputs, tmp_path, capsys):
    code, lines = call(program, inputs, tmp_path / ("x" * 300), capsys)
    assert code == 2
    assert len(lines) == 1
    assert "cannot be written (File name too long)" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_and_again_with_more_room(program, inputs, tmp_path, capsys):
    output = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))  # as a full disk: EFBIG for ENOSPC
    try:
        code, lines = call(program, inputs, output, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 3
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {output}: cannot be written (File too large); free some space there")
    again = output if program != "sample" else tmp_path / "other"  # holds the pictures that fitted
    assert call(program, inputs, again, capsys) == (0, [])
    assert not [p for p in tmp_path.rglob(".*") if ".tmp" in p.name]
