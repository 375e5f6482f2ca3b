"""Coupled routing in checkpoints: native ones carry it, diffusers cannot express it."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_nucleus.export import hf_keys, native
from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.load import load_model, read_description
from megatron_nucleus.export.merge import merge
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError, DataError


def velocity(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 6, 16, generator=generator)
    text = TextFeatures(torch.randn(2, 3, 24, generator=generator))
    with torch.no_grad():
        return model(latents, torch.tensor([0.2, 0.9]), text, (2, 3))


@pytest.fixture
def coupled(make, tmp_path):
    """(model, run folder)"""
    model = make.model(make.shape(decoupled_routing=False), 3)
    make.run(tmp_path / "run", model, 7)
    return model, tmp_path / "run"


def test_loading_gives_the_coupled_model_back(make, coupled, tmp_path):
    model, run = coupled
    state = json.loads((run / "checkpoints" / "step_00000007" / "state.json").read_text())
    assert state["model"]["decoupled_routing"] is False
    convert(run, tmp_path / "copy", "native")
    merge(run, tmp_path / "merged", last=1)
    twin = make.model(make.shape(), 3)  # the same weights, decoupled
    for folder in (run, tmp_path / "copy", tmp_path / "merged"):
        loaded = load_model(folder)
        assert not loaded.shape.decoupled_routing
        assert torch.equal(velocity(loaded), velocity(model))
    assert not torch.allclose(velocity(twin), velocity(model))


def test_a_checkpoint_from_before_the_flag_is_decoupled(make, tmp_path):
    model = make.model(make.shape(), 4)
    values = native.shape_to_dict(make.shape())
    del values["decoupled_routing"]
    make.run(tmp_path / "run", model, 7, model=values)
    assert read_description(tmp_path / "run").shape == make.shape(decoupled_routing=True)
    assert torch.equal(velocity(load_model(tmp_path / "run")), velocity(model))


def test_diffusers_is_refused_before_anything_is_written(coupled, tmp_path):
    with pytest.raises(
        ConfigError, match=r"model\.decoupled_routing: false.*keep the native checkpoint.*true"
    ):
        convert(coupled[1], tmp_path / "hf", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_diffusers_names_are_refused_too(make, coupled):
    shape = coupled[0].shape
    for refuse in (
        lambda: hf_keys.to_diffusers_config(shape),
        lambda: hf_keys.to_diffusers_state(coupled[0].state_dict(), shape),
    ):
        with pytest.raises(ConfigError, match=r"model\.decoupled_routing"):
            refuse()
    assert hf_keys.from_diffusers_config(hf_keys.to_diffusers_config(make.shape()), "c").decoupled_routing


def test_coupled_and_decoupled_checkpoints_do_not_merge(make, coupled, tmp_path):
    make.run(tmp_path / "run", make.model(make.shape(), 5), 8)
    with pytest.raises(DataError, match=r"model\.decoupled_routing"):
        merge(tmp_path / "run", tmp_path / "merged", last=2)
