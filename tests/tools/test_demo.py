"""tools/demo.py: every stage, on the scenes and on real photographs, at a size of seconds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_nucleus.data import buckets
from megatron_nucleus.export import native
from tests.support import ROOT, tool

STAGES = ["draw the corpus", "curate", "train", "merge", "convert", "sample", "score: merged", "score: last",
          "score: untrained", "score: truth"]  # fmt: skip


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "training": {"train_steps": 4, "global_batch_size": 8, "log_interval": 1, "save_interval": 2,
                             "sample_interval": 4, "tensorboard": False, "device": "cpu"},
                "model": {"preset": "demo", "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                          "mlp_ratio": 3.0, "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0},
                "data": {"data_path": "given by the demo", "resolution_px": 32, "num_workers": 0},
                "schedule": {"lr_warmup_steps": 2},
                "sampling": {"steps": 2, "guidance": 2.0},
            }
        )
    )  # fmt: skip
    return path


@pytest.mark.slow
def test_scenes_end_to_end_and_again(tiny_config, tmp_path):
    flags = ("--output", tmp_path / "demo", "--config", tiny_config, "--scenes", 64, "--merge-last", 2,
             "--prompts-per-skill", 1, "--json")  # fmt: skip
    result = json.loads(tool("demo", *flags).stdout.splitlines()[-1])
    assert list(result["seconds"]) == STAGES
    assert result["scores"]["truth"]["mean"] == 1.0
    assert result["scores"]["untrained"]["mean"] == 0.0
    out = tmp_path / "demo"
    assert Image.open(out / "pictures" / "grid.png").width > 100
    assert (out / "hf" / "config.json").is_file()
    report = (out / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert 'src="http' not in report
    again = tool("demo", *flags).stdout
    assert again.count("finished before in") == len(STAGES)


@pytest.mark.slow
def test_own_photographs_end_to_end(tiny_config, tmp_path):
    skimage = pytest.importorskip("skimage")
    source = Path(skimage.__file__).parent / "data"
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
            (folder / name).with_suffix(".txt").write_text(f"a photograph called {name.split('.')[0]}")
    found = len(list(folder.glob("*.txt")))
    assert found >= 2
    out = tool(
        "demo",
        "--data",
        folder,
        "--output",
        tmp_path / "demo",
        "--config",
        tiny_config,
        "--merge-last",
        2,
        "--json",
    )
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["scores"] == {}
    assert (tmp_path / "demo" / "prompts.txt").read_text().count("a photograph called") == found
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


LADDER = ("stage1_32", "stage2_64", "stage3_128")
TOKENS_PER_STEP = 2048


@pytest.fixture
def short_ladder(tmp_path) -> list[Path]:
    """The ladder's own files, each with a difference that makes it a few steps of a small model."""
    paths = []
    for name in LADDER:
        steps = {
            "training": {"train_steps": 3, "save_interval": 1, "keep_last_checkpoints": 4, "log_interval": 1,
                         "sample_interval": 0, "tensorboard": False, "device": "cpu"},
            "model": {"num_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "mlp_ratio": 3.0,
                      "moe_intermediate_dim": 32},
            "data": {"num_workers": 0},
            "validation": {"valid_samples": 8, "valid_interval_samples": 0, "valid_sigmas": 2},
            "sampling": {"steps": 2},
        }  # fmt: skip
        if name == "stage3_128":
            steps["model"]["capacity_factors"] = [0, 2, 1]  # its own list is for four layers
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"base": str(ROOT / "examples" / "scenes" / f"{name}.yaml"), **steps}))
        paths.append(path)
    return paths


def step_state(folder: Path, step: int) -> tuple[dict, dict]:
    """(weights, state.json) of a checkpoint."""
    path = folder / "checkpoints" / native.step_name(step)
    store = native.open_tensors(path, "model")
    return {name: store.read(name) for name in store.names()}, native.read_state(path)


@pytest.mark.slow
def test_the_ladder_end_to_end(short_ladder, tmp_path):
    out = tmp_path / "ladder"
    flags = ("--output", out, "--config", *short_ladder, "--scenes", 160, "--scene-sizes", "128x128", "168x96",
             "--merge-last", 2, "--prompts-per-skill", 1, "--json")  # fmt: skip
    result = json.loads(tool("demo", *flags).stdout.splitlines()[-1])
    assert list(result["seconds"]) == [
        "draw the corpus", "curate", *(f"train {name}" for name in LADDER), "merge", "convert", "sample",
        "score: merged", "score: last", "score: untrained", "score: truth",
    ]  # fmt: skip
    assert result["scores"]["truth"]["mean"] == 1.0
    assert Image.open(next((out / "pictures").glob("*/*.png"), out / "pictures" / "grid.png")).width >= 128
    folders = [out / f"train_{name}" for name in LADDER]
    runs = [step_state(folder, 3) for folder in folders]
    shapes = [{name: value.shape for name, value in weights.items()} for weights, _ in runs]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(shapes[0]) > 20
    capacities = [tuple(state["model"]["capacity_factors"]) for _, state in runs]
    assert capacities == [(4.0, 4.0, 4.0), (2.0, 2.0, 2.0), (0.0, 2.0, 1.0)]
    for folder, px in zip(folders, (32, 64, 128), strict=True):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 3
        before = 0
        for row in rows:
            width, height = buckets.size(row["bucket"], px, 8)
            images, before = row["samples_seen"] - before, row["samples_seen"]
            tokens = images * width * height // 64
            assert abs(tokens / TOKENS_PER_STEP - 1) < 0.02  # a whole number of images
    for earlier, later in itertools.pairwise(runs):
        started = later[1]["started_from"]
        assert (started["step"], started["optimizer"]) == (3, True)
        assert Path(started["path"]).parents[1] in folders
        assert earlier[1]["step"] == 3
    again = tool("demo", *flags).stdout
    assert again.count("finished before in") == len(result["seconds"])


@pytest.mark.slow
def test_the_second_stage_starts_from_the_first_ones_exact_weights(short_ladder, tmp_path):
    out = tmp_path / "ladder"
    tool("make_scenes", "--output", out / "corpus", "--count", 64, "--scene-sizes", "128x128")
    tool(
        "curate",
        "--input",
        out / "corpus",
        "--output",
        out / "data",
        "--config",
        "examples/scenes/curate.yaml",
    )
    flags = ("--data-path", out / "data", "--train-steps", 1)
    tool("train", "--config", short_ladder[0], "--run-dir", out / "first", *flags)
    still = ("--lr", 0, "--init-from", out / "first")  # a step at rate 0 changes nothing
    tool("train", "--config", short_ladder[1], "--run-dir", out / "second", *flags, *still)
    (first, _), (second, _) = step_state(out / "first", 1), step_state(out / "second", 1)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


def test_run_folders_need_different_names(short_ladder):
    done = tool("demo", "--config", short_ladder[0], short_ladder[0], check=False)
    assert done.returncode == 2
    assert "file names must differ" in done.stderr


def test_missing_folder_is_named():
    done = tool("demo", "--data", "/nowhere/photos", check=False)
    assert done.returncode == 2
    assert "--data /nowhere/photos: no such folder" in done.stderr
