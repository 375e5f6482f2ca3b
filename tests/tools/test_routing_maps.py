"""tools/routing_maps.py as a user calls it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.inference.conftest import TINY, random_model, write_checkpoint

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "routing_maps.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("native") / "step_00000007", random_model())


def main(*argv) -> None:
    """The program's `main`; a later flag beats an earlier one."""
    spec = importlib.util.spec_from_file_location("routing_maps_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--prompt", "a red circle", "--device", "cpu", *map(str, argv)])


def test_maps_of_a_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "maps"
    main("--checkpoint", checkpoint, "--output", out, "--steps", 2, "--width", 24, "--seed", 5, "--json")
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result["page_steps"], result["page_expert_steps"]) == (2, 2)
    assert result["page"] == str(out / "routing.html")
    document = json.loads((out / "routing.json").read_text())
    assert document["prompt"] == "a red circle"
    assert document["seed"] == 5
    assert document["grid"] == [4, 3]
    assert document["sampling"] == {"steps": 2, "guidance": 3.0, "shift": 2.0, "height": 32, "width": 24}
    assert [layer["layer"] for layer in document["all_steps"]["layers"]] == [1, 2]
    # capacity factors 2 and 1: so many experts take a token on average
    assert [layer["experts_per_token"] for layer in document["steps"][0]["layers"]] == pytest.approx([2, 1])


def test_another_seed_or_guidance_is_another_drawing(checkpoint, tmp_path):
    masses = []
    for i, flags in enumerate([(), ("--seed", 1), ("--guidance", 1), ("--negative-prompt", "blue"), ()]):
        main("--checkpoint", checkpoint, "--output", tmp_path / str(i), *flags)
        masses.append(json.loads((tmp_path / str(i) / "routing.json").read_text())["all_steps"])
    assert masses[0] == masses[4]
    assert all(masses[0] != other for other in masses[1:4])


def test_an_earlier_job_is_kept_unless_told_otherwise(checkpoint, tmp_path):
    (tmp_path / "routing.html").write_text("earlier")
    with pytest.raises(ConfigError, match="holds 1 files of an earlier job"):
        main("--checkpoint", tmp_path / "nowhere", "--output", tmp_path)  # found before the checkpoint is
    assert (tmp_path / "routing.html").read_text() == "earlier"
    main("--checkpoint", checkpoint, "--output", tmp_path, "--overwrite", "--steps", 1)
    assert "Which experts work where" in (tmp_path / "routing.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--height", 33), "--height 33: must be a multiple of 8 px"),
        (("--steps", 0), "--steps 0: must be at least 1"),
        (("--layers", 0), "--layers 0: the MoE layers of this model are 1, 2"),
        (("--height", 8, "--width", 8, "--layer", 1), "unknown argument --layer"),
        (("--device", "cuda:77"), "cuda:77"),
    ],
)
def test_bad_settings(checkpoint, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        main("--checkpoint", checkpoint, "--output", tmp_path / "maps", *flags)
    assert not (tmp_path / "maps").exists()


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        main("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "maps")
    shape = dataclasses.replace(TINY, dense_moe_strategy="all_dense")
    dense = write_checkpoint(tmp_path / "step_00000001", random_model(shape=shape))
    with pytest.raises(ConfigError, match=r"step_00000001: the model has no MoE layers"):
        main("--checkpoint", dense, "--output", tmp_path / "maps")
    damaged = write_checkpoint(tmp_path / "step_00000002", random_model())
    (damaged / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json"):
        main("--checkpoint", damaged, "--output", tmp_path / "maps")
    assert not (tmp_path / "maps").exists()
