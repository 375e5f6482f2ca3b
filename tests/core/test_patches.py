"""Packing, against diffusers' pipeline."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core.patches import pack, unpack
from megatron_nucleus.utils.errors import ConfigError


def test_packing_is_diffusers_packing_and_inverts():
    pipeline = pytest.importorskip("diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image")
    latents = torch.randn(2, 16, 6, 10)
    tokens, grid = pack(latents, 2)
    assert grid == (3, 5)
    theirs = pipeline.NucleusMoEImagePipeline._pack_latents(latents.unsqueeze(1), 2, 16, 6, 10, 2)
    assert torch.equal(tokens, theirs)
    assert torch.equal(unpack(tokens, grid, 2), latents)


def test_odd_sizes_are_refused():
    with pytest.raises(ConfigError, match="5 x 4"):
        pack(torch.zeros(1, 16, 5, 4), 2)
    with pytest.raises(ConfigError, match="2 x 4"):
        unpack(torch.zeros(1, 6, 64), (2, 4), 2)
