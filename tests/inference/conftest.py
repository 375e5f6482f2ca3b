"""A tiny model and a native checkpoint of it, with the embedded encoders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.export import native
from tests.shapes import TINY as BASE

TINY = dataclasses.replace(
    BASE,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    text_dim=256,
    latent_channels=16,
    mlp_ratio=4.0,
    moe_intermediate_dim=24,
    capacity_factors=(0.0, 2.0, 1.0),
)


def random_model(seed: int = 0, shape: ModelShape = TINY) -> NucleusTransformer:
    """Random weights everywhere, also where a fresh model has zeros; outputs of about unit size."""
    model = NucleusTransformer(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                scale = 0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
    return model.eval()


def write_checkpoint(folder: Path, model: NucleusTransformer, **state) -> Path:
    """A native checkpoint with plain safetensors, encoders and sampling defaults."""
    encoders = EncoderConfig()
    document = {
        "format": 1,
        "step": 7,
        "samples_seen": 70,
        "skipped": 0,
        "model": native.shape_to_dict(model.shape),
        "codec": encoders.codec_spec(),
        "text_encoder": encoders.text_spec(),
        "sampling": {"steps": 3, "guidance": 3.0, "shift": 2.0, "height": 32, "width": 40},
        **state,
    }
    (folder / "model").mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model" / "model.safetensors"
    )
    (folder / "state.json").write_text(json.dumps(document))
    native.write_manifest(folder, native.describe_files(folder))
    return folder


@pytest.fixture
def tiny_model():
    return random_model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Native checkpoint folder of `random_model()`."""
    return write_checkpoint(tmp_path_factory.mktemp("native") / "step_00000007", random_model())


@pytest.fixture
def write():
    """`write_checkpoint`, for tests that need another one."""
    return write_checkpoint
