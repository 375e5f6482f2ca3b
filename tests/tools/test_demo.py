"""tools/demo.py: every stage, on the scenes and on real photographs, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_nucleus.utils.errors import StoppedError
from tests.support import tool
from tools.demo import Runner, Stage

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


def test_a_changed_stage_runs_again_with_all_after_it_and_interrupted_time_counts(tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, sys, time\n"
        "log = pathlib.Path(sys.argv[1]); log.write_text((log.read_text() if log.exists() else '') + sys.argv[2])\n"
        "time.sleep(0.2)\n"
        "sys.exit(4) if pathlib.Path(sys.argv[1] + '.fail').exists() else print(json.dumps({'ran': sys.argv[2]}))\n"
    )
    config, log = tmp_path / "config", tmp_path / "log"
    config.write_text("1")
    fresh = tmp_path / "fresh"

    def run_all() -> Runner:
        runner = Runner(tmp_path, total=3)
        for name in "abc":
            stage = Stage(
                name, (str(program), str(log), name), reads=config if name == "b" else None,
                fresh=fresh if name == "c" else None,
            )  # fmt: skip
            assert runner.run(stage) == {"ran": name}
        return runner

    run_all()
    run_all()
    assert log.read_text() == "abc"
    config.write_text("2")
    fresh.mkdir()
    run_all()
    assert log.read_text() == "abcbc"
    assert not fresh.exists()
    config.write_text("3")
    fail = tmp_path / "log.fail"
    fail.touch()
    with pytest.raises(StoppedError, match="stage 'b' ended with code 4"):
        run_all()
    fail.unlink()
    assert run_all().seconds()["b"] > 0.4
    assert log.read_text() == "abcbcbbc"


def test_missing_folder_is_named():
    done = tool("demo", "--data", "/nowhere/photos", check=False)
    assert done.returncode == 2
    assert "--data /nowhere/photos: no such folder" in done.stderr
