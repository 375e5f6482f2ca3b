"""The two-way table of names, shapes and configuration."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import DENSE_STRATEGIES, PRESETS
from megatron_nucleus.export import hf_keys
from megatron_nucleus.utils.errors import DataError


@pytest.mark.parametrize("strategy", DENSE_STRATEGIES)
@pytest.mark.parametrize("layers", [1, 5])
def test_table_names_exactly_the_parameters_of_both_models(make, strategy, layers):
    shape = make.shape(
        num_layers=layers, dense_moe_strategy=strategy, num_attention_heads=4, latent_channels=3
    )
    with torch.device("meta"):
        ours = {n: tuple(p.shape) for n, p in NucleusTransformer(shape).named_parameters()}
    theirs = {n: tuple(p.shape) for n, p in make.diffusers(shape, 0).state_dict().items()}
    keys = hf_keys.keys(shape)
    assert {k.native: k.shape for k in keys} == ours
    assert {k.diffusers: k.shape for k in keys} == theirs


def test_counts_of_the_released_model():
    keys = hf_keys.keys(PRESETS["nucleus_image_17b"])
    assert hf_keys.count_parameters(PRESETS["nucleus_image_17b"]) == 16_922_679_296
    assert sum(math.prod(k.shape) for k in keys if ".experts." in k.native) == 15_325_986_816
    assert sum(math.prod(k.shape) for k in keys if k.native.endswith("router.weight")) == 29 * 262_144


def test_released_config_both_ways():
    """transformer/config.json of the released checkpoint."""
    config = {
        "_class_name": "NucleusMoEImageTransformer2DModel",
        "_diffusers_version": "0.38.0.dev0",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "capacity_factors": [0, 0, 0, 4, 4] + [2] * 27,
        "dense_moe_strategy": "leave_first_three_blocks_dense",
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "mlp_ratio": 4.0,
        "moe_enabled": True,
        "moe_intermediate_dim": 1344,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_key_value_heads": 4,
        "num_layers": 32,
        "out_channels": 16,
        "patch_size": 2,
        "route_scale": 2.5,
        "use_grouped_mm": True,
        "use_sigmoid": False,
    }
    shape = hf_keys.from_diffusers_config(config, "config.json")
    assert shape == PRESETS["nucleus_image_17b"]
    back = hf_keys.to_diffusers_config(shape)
    assert {k: v for k, v in back.items() if k != "_diffusers_version"} == {
        k: v for k, v in config.items() if k != "_diffusers_version"
    }


def test_config_written_by_diffusers_gives_the_shape_back(make):
    for changes in ({}, {"use_sigmoid": True, "route_scale": 1.5}, {"dense_moe_strategy": "all_dense"}):
        shape = make.shape(**changes)
        config = dict(make.diffusers(shape, 0).config, _class_name=hf_keys.CLASS_NAME)
        assert hf_keys.from_diffusers_config(config, "c") == shape


def test_upstream_spellings_are_understood(make):
    base = hf_keys.to_diffusers_config(make.shape())
    read = hf_keys.from_diffusers_config
    assert read({**base, "capacity_factors": 2.0}, "c").capacity_factors == (2.0,) * 5
    assert read({**base, "num_key_value_heads": None}, "c").num_key_value_heads == 2
    assert read({**base, "moe_enabled": False}, "c").dense_moe_strategy == "all_dense"
    assert read({**base, "capacity_factors": [1.0] * 9}, "c").capacity_factors == (1.0,) * 5
    assert read({**base, "in_channels": 16, "out_channels": None, "patch_size": 1}, "c").latent_channels == 16
    left_out = {k: v for k, v in base.items() if k != "route_scale"}
    assert read(left_out, "c").route_scale == 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"dense_moe_strategy": "leave_first_blok_dense"}, "did you mean leave_first_block_dense"),
        ({"use_sigmoids": True}, r"use_sigmoids.*did you mean use_sigmoid"),
        ({"out_channels": 5}, "out_channels 5"),
        ({"out_channels": None}, "in_channels"),
        ({"capacity_factors": [1.0, 2.0]}, "2 values for 5 layers"),
        ({"num_layers": "many"}, "wrong type"),
        ({"axes_dims_rope": [4, 4, 4]}, "axes_dims_rope"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"mlp_ratio": 0.5}, "mlp_ratio"),
    ],
)
def test_bad_configs_name_file_and_key(make, change, message):
    config = {**hf_keys.to_diffusers_config(make.shape()), **change}
    with pytest.raises(DataError, match=rf"x/config\.json: .*{message}"):
        hf_keys.from_diffusers_config(config, "x/config.json")


def test_grouped_mm_only_where_its_kernel_works(make):
    """Rows that are no multiple of 16 bytes make F.grouped_mm refuse."""
    assert hf_keys.to_diffusers_config(make.shape())["use_grouped_mm"] is True
    assert hf_keys.to_diffusers_config(make.shape(moe_intermediate_dim=12))["use_grouped_mm"] is False


def test_state_dicts_in_memory_both_ways(make):
    shape = make.shape()
    theirs = make.diffusers(shape, 5).state_dict()
    ours = hf_keys.to_native_state(theirs, shape)
    up, gate = theirs["transformer_blocks.0.img_mlp.net.0.proj.weight"].chunk(2)
    assert torch.equal(ours["blocks.0.feed_forward.gate_up.weight"], torch.cat([gate, up]))
    assert ours["image_in.weight"] is theirs["img_in.weight"]
    back = hf_keys.to_diffusers_state(ours, shape)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
