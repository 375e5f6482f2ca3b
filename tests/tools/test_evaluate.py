"""tools/evaluate.py: sources, the sample store and its continuation, exit codes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.encoders import EncoderConfig, build_text_encoder
from megatron_nucleus.evaluation.sample_store import fingerprint
from megatron_nucleus.export import native
from megatron_nucleus.utils.errors import ConfigError, DataError
from tools import evaluate

ROOT = Path(__file__).resolve().parents[2]
SKILLS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")


def scores(capsys, *arguments) -> dict:
    """Run the program in this process and parse its last line."""
    evaluate.main(["scenes", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def truth(tmp_path, capsys):
    """A folder of true pictures: 4 prompts of each skill, 2 pictures of each, one seed."""
    command = ("--truth", "--prompts-per-skill", 4, "--samples-per-prompt", 2, "--output", tmp_path / "store")
    assert scores(capsys, *command)["generated"] == 64
    return tmp_path / "store", command


def test_true_scenes_score_one(truth, capsys):
    store, _ = truth
    result = scores(capsys, "--images", store)
    assert result["source"] == "images"
    assert {skill: result[skill] for skill in ("mean", *SKILLS)} == dict.fromkeys(("mean", *SKILLS), 1.0)
    assert result["samples"] == 48
    assert result["held_out_pairs"] == {
        "colors": 1.0, "color_attribution": 1.0, "samples": 16,
        "standard_error": {"colors": 0.0, "color_attribution": 0.0},
    }  # fmt: skip
    assert (result["seeds"], result["std_over_seeds"]) == ([0], None)
    written = json.loads((store / "results.json").read_text())
    assert (written["mean"], written["source"]) == (1.0, "truth")
    rows = [json.loads(line) for line in (store / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    assert all(row["correct"] for row in rows)
    assert rows[0]["filename"] == "seed_0/00000/samples/0000.png"
    alone = scores(capsys, "--images", store / "seed_0")  # GenEval's layout, of which no seed is known
    assert (alone["mean"], alone["samples"]) == (1.0, 48)
    assert (alone["seeds"], alone["std_over_seeds"], alone["per_seed"]) == (None, None, [])
    assert Image.open(store / rows[0]["filename"]).size == (32, 32)


def test_wrong_pictures_cost_their_skill_only(truth, capsys):
    store, _ = truth
    wrong = 0
    for folder in sorted(p for p in (store / "seed_0").iterdir() if p.is_dir()):
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        if metadata["tag"] == "counting":
            Image.new("RGB", (32, 32), (100, 100, 100)).save(folder / "samples/0001.png")
            wrong += 1
    result = scores(capsys, "--images", store)
    assert wrong == 4
    assert result["counting"] == 0.5
    assert result["mean"] == pytest.approx(5.5 / 6)
    assert result["standard_error"]["counting"] == 0.0  # every prompt scored one half


def test_free_tier_and_sizes(tmp_path, capsys):
    result = scores(
        capsys, "--truth", "--tier", "free", "--scene-sizes", "48x80", "64x64", "--max-objects", 6,
        "--prompts-per-skill", 5, "--output", tmp_path / "store",
    )  # fmt: skip
    assert result["mean"] == 1.0
    sizes = {Image.open(p).size for p in (tmp_path / "store").glob("seed_0/*/samples/*.png")}
    assert sizes == {(48, 80), (64, 64)}


def test_without_output_nothing_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert scores(capsys, "--truth", "--prompts-per-skill", 1)["samples"] == 6
    assert not list(tmp_path.iterdir())


def test_the_same_command_makes_only_what_is_missing(truth, capsys):
    store, command = truth
    pictures = {p: p.read_bytes() for p in store.glob("seed_0/*/samples/*.png")}
    assert scores(capsys, *command)["generated"] == 0
    gone, cut, *_ = pictures
    gone.unlink()
    cut.write_bytes(pictures[cut][:60])
    assert scores(capsys, *command)["generated"] == 2
    assert {p: p.read_bytes() for p in store.glob("seed_0/*/samples/*.png")} == pictures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seeds", 1, "--tier", "free"), "seed_0: .*tier grid -> free"),  # nor beside each other
        (("--seeds", 1, 0, "--tier", "free"), "seed_0: .*tier grid -> free"),
        (("--seeds", 1, "--prompts-per-skill", 5), "prompts_per_skill 4 -> 5"),
        (("--samples-per-prompt", 1), "samples_per_prompt 2 -> 1"),
        (("--prompts-per-skill", 5), "prompts "),
        (("--tier", "free"), "tier grid -> free"),
    ],
)
def test_other_settings_never_mix_with_stored_pictures(truth, change, message):
    store, command = truth
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["scenes", *map(str, (*command, *change))])
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_seeds_are_made_once_and_score_as_one(tmp_path, capsys):
    """Three seeds at once, or one after the other: the same pictures, prompts and noise of their own, one result."""
    command = ("--truth", "--prompts-per-skill", 3, "--output", tmp_path / "store")
    made = [scores(capsys, *command, "--seeds", *seeds)["generated"] for seeds in ((1,), (0,), (1, 0, -4))]
    assert made == [24, 24, 24]
    spoiled = []
    for folder in sorted((tmp_path / "store" / "seed_-4").glob("0*")):  # one wrong picture of each skill
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        if metadata["tag"] not in spoiled and "split" not in metadata:
            spoiled.append(metadata["tag"])
            Image.new("RGB", (32, 32), (100, 100, 100)).save(folder / "samples/0000.png")
    result = scores(capsys, *command, "--seeds", 1, 0, -4)
    assert (result["generated"], result["samples"], result["seeds"]) == (0, 54, [1, 0, -4])
    assert (result["mean"], result["counting"]) == (pytest.approx(8 / 9), pytest.approx(8 / 9))
    assert [row["mean"] for row in result["per_seed"]] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert result["std_over_seeds"]["mean"] == pytest.approx(math.sqrt(1 / 27))
    error = math.sqrt(8 / 81 / 8)  # binomial, of nine prompts
    assert result["standard_error"]["counting"] == pytest.approx(error)
    assert result["standard_error"]["mean"] == pytest.approx(error / math.sqrt(6))
    again = scores(capsys, "--images", tmp_path / "store")
    assert (again["seeds"], again["samples"], again["mean"]) == ([-4, 0, 1], 54, result["mean"])
    assert again["standard_error"] == pytest.approx(result["standard_error"])
    files = {seed: {p.relative_to(tmp_path / f"store/seed_{seed}"): p.read_bytes()
                    for p in (tmp_path / f"store/seed_{seed}").rglob("*.png")} for seed in (0, 1)}  # fmt: skip
    assert files[0].keys() == files[1].keys()
    assert all(files[0][name] != files[1][name] for name in files[0])
    prompts = [[json.loads(p.read_text())["prompt"] for p in sorted((tmp_path / f"store/seed_{seed}").rglob("*.jsonl"))]
               for seed in (0, 1)]  # fmt: skip
    assert prompts[0] != prompts[1]


def test_the_printed_lines_carry_errors_and_numbers(tmp_path, capsys):
    command = ["scenes", "--truth", "--prompts-per-skill", "2", "--seeds", "0", "1"]
    evaluate.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mean               1.000 ± 0.000 (n = 24)"
    assert lines[1] == "single_object      1.000 ± 0.000 (n = 4)"
    assert lines[-1] == "mean by seed       0: 1.000 1: 1.000; standard deviation 0.000"


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(ConfigError, match="/dev/null/x: /dev/null is a file"):
        evaluate.main(["scenes", "--truth", "--prompts-per-skill", "1", "--output", "/dev/null/x"])


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds other files"):
        evaluate.main(["scenes", "--truth", "--output", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_settings_file_is_named(truth):
    store, command = truth
    (store / "seed_0/settings.json").write_text("{")
    with pytest.raises(DataError, match=re.escape(str(store / "seed_0/settings.json"))):
        evaluate.main(["scenes", *map(str, command)])


# ---------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A native checkpoint of a tiny model with random weights, for the embedded codec and text encoder."""
    folder = tmp_path_factory.mktemp("run") / "step_00000003"
    text_spec = EncoderConfig().text_spec()
    shape = ModelShape(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, num_key_value_heads=1,
        text_dim=build_text_encoder(text_spec).dim, latent_channels=16, patch_size=2,
        axes_dims_rope=(4, 6, 6), mlp_ratio=8.0, dense_moe_strategy="leave_first_block_dense",
        num_experts=4, moe_intermediate_dim=16, capacity_factors=(0.0, 2.0), use_sigmoid=False,
        route_scale=2.5,
    )  # fmt: skip
    model = NucleusTransformer(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    (folder / "model").mkdir(parents=True)
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters()}, folder / "model/model.safetensors"
    )
    state = {
        "format": 1, "step": 3, "samples_seen": 24, "skipped": 0, "seed": 0,
        "model": native.shape_to_dict(shape), "codec": EncoderConfig().codec_spec(), "text_encoder": text_spec,
        "sampling": {"steps": 2, "guidance": 2.0, "shift": 1.0, "height": 32, "width": 32},
        "data": {}, "git_commit": None, "versions": {},
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    native.write_manifest(folder, native.describe_files(folder))
    return folder


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_checkpoint_is_sampled_kept_and_continued(checkpoint, tmp_path, capsys):
    command = ("--checkpoint", checkpoint, "--prompts-per-skill", 2, "--output", tmp_path / "store")
    first = scores(capsys, *command, "--batch-size", 5)
    assert (first["source"], first["generated"], first["samples"]) == ("checkpoint", 16, 12)
    settings = json.loads((tmp_path / "store/seed_0/settings.json").read_text())
    assert {k: settings[k] for k in ("steps", "guidance", "height", "dtype", "checkpoint")} == {
        "steps": 2, "guidance": 2.0, "height": 32, "dtype": "float32", "checkpoint": fingerprint(checkpoint),
    }  # fmt: skip
    pictures = {p: pixels_of(p) for p in (tmp_path / "store").glob("seed_0/*/samples/*.png")}
    assert len({v.tobytes() for v in pictures.values()}) == 16, "every picture has its own noise"
    for path in list(pictures)[::3]:
        path.unlink()
    again = scores(capsys, *command, "--batch-size", 16)
    assert again["generated"] == 6
    assert again["mean"] == first["mean"]
    for path, pixels in pictures.items():  # the rest of a batch changes rounding only
        assert abs(pixels_of(path) - pixels).max() <= 1
    with pytest.raises(ConfigError, match="steps 2 -> 3"):
        evaluate.main(["scenes", *map(str, command), "--steps", "3"])
    with pytest.raises(ConfigError, match="source checkpoint -> untrained"):
        evaluate.main(["scenes", *map(str, command), "--untrained"])


def test_an_untrained_model_scores_nothing(checkpoint, capsys):
    result = scores(capsys, "--checkpoint", checkpoint, "--untrained", "--prompts-per-skill", 4)
    assert (result["source"], result["mean"]) == ("untrained", 0.0)


def test_fingerprints_tell_weights_apart(checkpoint, tmp_path):
    files = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": bytes(300_000)}
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
    (tmp_path / "c/diffusion_pytorch_model.safetensors").write_bytes(bytes(299_999) + b"\1")
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b
    assert len({a, c, fingerprint(checkpoint)}) == 3


def test_a_checkpoint_that_lost_its_optimizer_state_is_the_same_model(checkpoint, tmp_path):
    step = tmp_path / "step"
    shutil.copytree(checkpoint, step)
    before = fingerprint(step)
    files = native.read_manifest(step)
    native.write_manifest(step, {**files, "optimizer/a.safetensors": {"bytes": 1, "sha256": "0"}})
    assert fingerprint(step) == before
    native.write_manifest(step, {**files, "model/b.safetensors": {"bytes": 1, "sha256": "0"}})
    assert fingerprint(step) != before


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: BENCHMARK"),
        (["scene"], "invalid choice: 'scene'"),
        (["scenes"], "exactly one of --images DIR, --checkpoint PATH and --truth; got none"),
        (["scenes", "--truth", "--images", "x"], "got --images and --truth"),
        (["scenes", "--truth", "--untrained"], "--untrained needs --checkpoint"),
        (["scenes", "--truth", "--steps", "3"], "--steps 3: is used with --checkpoint, not with --truth"),
        (
            ["scenes", "--images", "x", "--seeds", "3", "4"],
            "--seeds 3 4: is used with --checkpoint or --truth",
        ),
        (["scenes", "--truth", "--stepz", "3"], "unknown argument --stepz (did you mean --steps?)"),
        (["scenes", "--truth", "--prompts-per-skill", "0"], "--prompts-per-skill 0: at least 1"),
        (["scenes", "--truth", "--samples-per-prompt", "0"], "--samples-per-prompt 0: at least 1"),
        (["scenes", "--truth", "--max-objects", "5"], "--max-objects 5: 2 to 4 for tier grid"),
        (["scenes", "--truth", "--scene-sizes", "16x16"], "both sides must be 32 to 1024"),
        (["scenes", "--truth", "--seeds", "1", str(1 << 70)], "each must be a 64-bit number"),
        (["scenes", "--truth", "--seeds", "1", "1"], "--seeds 1 1: name at least one seed, each once"),
        (["scenes", "--truth", "--seed", "1"], "unknown argument --seed (did you mean --seeds?)"),
        (["scenes", "--checkpoint", "/nowhere/at/all"], "/nowhere/at/all"),
        (["scenes", "--images", "/nowhere/at/all"], "--images /nowhere/at/all: no such folder"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate.main(arguments)


def test_pictures_too_small_to_judge_are_refused_before_they_are_made(checkpoint):
    with pytest.raises(ConfigError, match="--height 16: the scorer needs at least 32 px"):
        evaluate.main(["scenes", "--checkpoint", str(checkpoint), "--height", "16"])


def test_exit_codes_and_one_line_errors(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools/evaluate.py"), "scenes", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    bad = run("--truth", "--tier", "hard")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert bad.stderr.startswith("error: --tier")
    empty = run("--images", tmp_path)
    assert (empty.returncode, empty.stderr.count("\n")) == (3, 1)
    assert str(tmp_path) in empty.stderr
