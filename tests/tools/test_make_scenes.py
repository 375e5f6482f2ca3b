"""tools/make_scenes.py: flags reach the generator, and errors name what is wrong."""

from __future__ import annotations

import json
import re
import tarfile

import pytest

from megatron_nucleus.data import scenes
from megatron_nucleus.utils.errors import ConfigError
from tools import make_scenes


def test_flags_and_config_file_decide_what_is_drawn(tmp_path, capsys):
    config = tmp_path / "scenes.yaml"
    config.write_text("scenes:\n  tier: free\n  scene_sizes: [48x80]\n  max_objects: 5\n")
    output = tmp_path / "out"
    make_scenes.main(
        ["--output", str(output), "--count", "12", "--seed", "3", "--config", str(config),
         "--scene-sizes", "64x40", "--samples-per-shard", "8", "--json"]
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["count"], result["seed"]) == (12, 3)
    assert result["bytes"] == sum(f.stat().st_size for f in output.iterdir())
    expected = scenes.SceneConfig(tier="free", scene_sizes=("64x40",), max_objects=5)
    with tarfile.open(output / "00001.tar") as tar:
        side = json.load(tar.extractfile("000000011.json"))
    assert side["captions"][1]["text"] == scenes.captions(scenes.make_scene(expected, 3, 11))[1].text
    assert (side["width"], side["height"]) == (64, 40)


def test_a_folder_of_images(tmp_path):
    make_scenes.main(["--output", str(tmp_path / "out"), "--count", "3", "--format", "folder"])
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((tmp_path / "out").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "3"], "required: --output"),
        (["--output", "x"], "required: --count"),
        (["--output", "x", "--count", "many"], "--count: invalid int value: 'many'"),
        (["--output", "x", "--count", "-1"], "--count -1"),
        (["--output", "x", "--count", "3", "--teir", "free"], "did you mean --tier?"),
        (["--output", "x", "--count", "3", "--tier", "fre"], "did you mean free?"),
        (["--output", "x", "--count", "3", "--format", "zip"], "invalid choice: 'zip'"),
        (["--output", "x", "--count", "3", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--output", "/dev/null/x", "--count", "3"], "--output /dev/null/x: /dev/null is a file"),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_scenes.main(arguments)
    assert not list(tmp_path.iterdir())
