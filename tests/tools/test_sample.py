"""tools/sample.py as a user calls it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.export import native
from megatron_nucleus.export.convert import convert
from megatron_nucleus.inference.outputs import read_prompts
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.shapes import TINY

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "sample.py"
SHAPE = dataclasses.replace(TINY, text_dim=256, latent_channels=16)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with one native checkpoint and the embedded encoders."""
    run = tmp_path_factory.mktemp("run")
    step = run / "checkpoints" / "step_00000003"
    (step / "model").mkdir(parents=True)
    model = NucleusTransformer(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.2, generator=generator)
    save_file(model.state_dict(), step / "model" / "model.safetensors")
    encoders = EncoderConfig()
    state = {
        "format": 1,
        "step": 3,
        "model": native.shape_to_dict(SHAPE),
        "codec": encoders.codec_spec(),
        "text_encoder": encoders.text_spec(),
        "sampling": {"steps": 2, "guidance": 3.0, "shift": 2.0, "height": 32, "width": 32},
    }
    (step / "state.json").write_text(json.dumps(state))
    native.write_manifest(step, native.describe_files(step))
    native.set_latest(step.parent, step)
    return run


def main(argv) -> None:
    """The program's `main`."""
    spec = importlib.util.spec_from_file_location("sample_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in argv])


def call(capsys, *argv) -> dict:
    main([*argv, "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_pictures_list_and_metadata_agree(run_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a red circle\n\n  zwei blaue Quadrate, größer  \n\n三个绿色三角形\n", encoding="utf-8"
    )
    out = tmp_path / "out"
    result = call(
        capsys, "--checkpoint", run_folder, "--prompts", prompts, "--output", out, "--samples-per-prompt", 2,
        "--seed", 40, "--width", 48, "--negative-prompt", "blurred", "--batch-size", 4,
    )  # fmt: skip
    assert result["output"] == str(out)
    assert result["images"] == 6
    assert result["images_per_s"] == pytest.approx(6 / result["seconds"])
    listed = rows(out)
    want = ["a red circle", "zwei blaue Quadrate, größer", "三个绿色三角形"]
    assert [r["prompt"] for r in listed] == [p for p in want for _ in range(2)]
    assert [r["seed"] for r in listed] == [40, 41, 42, 43, 44, 45]
    pipeline = load_pipeline(run_folder, device="cpu")
    for i, row in enumerate(listed):
        assert row["file"] == f"{i:05d}.png"
        assert (row["height"], row["width"], row["steps"], row["guidance"], row["shift"]) == (
            32,
            48,
            2,
            3.0,
            2.0,
        )
        assert row["negative_prompt"] == "blurred"
        with Image.open(out / row["file"]) as picture:
            assert picture.text == {"prompt": row["prompt"], "seed": str(row["seed"])}
            drawn = np.asarray(picture, np.int16)
        again = pipeline.generate(
            [row["prompt"]], seeds=[row["seed"]], negative_prompts="blurred", width=48, progress=False
        )
        assert np.abs(np.asarray(again[0], np.int16) - drawn).max() <= 1
    grid = Image.open(out / "grid.png")
    assert grid.width > 2 * 192
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{i:05d}.png" for i in range(6)),
        "grid.png",
        "samples.jsonl",
    ]


def test_blank_lines_are_reported(run_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n\n")
    arguments = ["--checkpoint", run_folder, "--prompts", prompts, "--output", tmp_path / "out"]
    main([*arguments, "--device", "cpu"])
    assert "1 prompts, 2 blank lines skipped" in capsys.readouterr().out


def test_native_and_exported_checkpoints_draw_the_same(run_folder, tmp_path, capsys):
    convert(run_folder, tmp_path / "exported", "hf")
    for name, source in (("native", run_folder), ("hf", tmp_path / "exported")):
        call(capsys, "--checkpoint", source, "--prompt", "a red circle", "--output", tmp_path / name)
    first, second = ((tmp_path / name / "00000.png").read_bytes() for name in ("native", "hf"))
    assert first == second


def test_earlier_pictures_are_never_overwritten_silently(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    base = ["--checkpoint", run_folder, "--output", out]
    call(capsys, *base, "--prompt", "a red circle", "--samples-per-prompt", 3)
    (out / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ConfigError, match=r"--output .*holds 5 files of an earlier job .*--overwrite"):
        call(capsys, *base, "--prompt", "a blue square")
    # a bad value must not delete them either
    for bad in (
        ["--height", 33],
        ["--samples-per-prompt", 0],
        ["--batch-size", 0],
        ["--negative-prompt", "a " * 200],
    ):
        with pytest.raises(ConfigError):
            call(capsys, *base, "--prompt", "a blue square", "--overwrite", *bad)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    call(capsys, *base, "--prompt", "a blue square", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "grid.png", "notes.txt", "samples.jsonl"]
    assert [r["prompt"] for r in rows(out)] == ["a blue square"]


def test_prompts_from_jsonl_ignore_other_keys(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"tag": "colors", "include": [], "prompt": "a red circle"}\n\n{"prompt": ""}\n')
    assert read_prompts(path) == (["a red circle", ""], 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', r"p\.jsonl, line 2: expected an object"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt: \n', r"p\.jsonl, line 3: not JSON"),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl, line 1: expected an object"),
        ("p.txt", b" \n\n", r"p\.txt: holds no prompt"),
        ("p.txt", b"", r"p\.txt: holds no prompt"),
        ("p.txt", b"caf\xe9\n", r"p\.txt: not UTF-8 text .* at byte 3"),
    ],
)
def test_damaged_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--output"),
        (["--output", "OUT"], "--prompt --prompts"),
        (["--output", "OUT", "--prompt", "a", "--prompts", "b"], "not allowed with"),
        (["--output", "OUT", "--prompts", "/nowhere/p.txt"], "--prompts /nowhere/p.txt: no such file"),
        (
            ["--output", "OUT", "--prompt", "a", "--step", "3"],
            r"unknown argument --step \(did you mean --steps\?\)",
        ),
        (["--output", "OUT", "--prompt", "a", "--steps", "few"], "--steps: invalid int value: 'few'"),
        (["--output", "OUT", "--prompt", "a", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--output", "OUT", "--prompt", "a", "--height", "20"], "--height 20: must be a multiple of 8 px"),
        (["--output", "OUT", "--prompt", "a " * 200], r"prompt 0 .*200 tokens .*limit of 128"),
        (["--output", "OUT", "--prompt", "a", "--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_arguments(run_folder, tmp_path, arguments, message):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    with pytest.raises(ConfigError, match=message):
        main(["--checkpoint", str(run_folder), *arguments])
    assert not list(tmp_path.glob("out/*.png"))


def test_output_that_is_a_file(run_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in ("file", "file/inside"):
        with pytest.raises(ConfigError, match=r"--output .*file"):
            main(["--checkpoint", str(run_folder), "--prompt", "a", "--output", str(tmp_path / output)])


def test_exit_codes_and_one_line_errors(run_folder, tmp_path):
    """The program itself: 2 with one line for a bad argument, 3 for a damaged checkpoint."""
    damaged = tmp_path / "damaged"
    convert(run_folder, damaged, "hf")
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    long = "a " * 200
    for checkpoint, prompt, code in ((tmp_path / "none", "a", 2), (damaged, "a", 3), (run_folder, long, 2)):
        done = subprocess.run(
            [sys.executable, PROGRAM, "--checkpoint", checkpoint, "--prompt", prompt, "--output", tmp_path / "o"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_routing_stats_cover_every_picture_and_step(run_folder, tmp_path, capsys):
    flags = ("--checkpoint", run_folder, "--prompt", "a circle", "--samples-per-prompt", 3, "--batch-size", 2)
    call(capsys, *flags, "--output", tmp_path / "a", "--routing-stats")
    call(capsys, *flags, "--output", tmp_path / "b")
    assert not (tmp_path / "b" / "routing.json").exists()
    names = [p.name for p in sorted((tmp_path / "b").iterdir()) if p.suffix == ".png"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    document = json.loads((tmp_path / "a" / "routing.json").read_text())
    assert [(row["step"], row["images"]) for row in document["steps"]] == [(1, 3), (2, 3)]
    assert document["all_steps"]["images"] == 6
    assert document["steps"][0]["layers"][0]["experts_per_token"] == 2.0  # capacity factor 2
    with pytest.raises(ConfigError, match="files of an earlier job"):
        call(capsys, *flags, "--output", tmp_path / "a")
    call(capsys, *flags, "--output", tmp_path / "a", "--overwrite")
    assert not (tmp_path / "a" / "routing.json").exists()


def test_experts_in_8_bits_draw_nearly_the_same(run_folder, tmp_path, capsys):
    prompts = ["--checkpoint", run_folder, "--prompt", "a red circle"]
    pictures = []
    for choice in ("stored", "fp8"):
        folder = tmp_path / choice
        call(capsys, *prompts, "--output", folder, "--expert-weights", choice)
        pictures.append(np.asarray(Image.open(folder / "00000.png"), np.float64))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 10  # grey levels of 255
