"""FP8 over several ranks: the pass comes before the model is spread, and the run is that of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.parallelize import materialise, parallelize
from megatron_nucleus.core.precision.precision import PrecisionConfig, apply_precision
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils import rng
from tests.core.parallel_cases import GRID, SHAPE, join, put, whole
from tests.ranks import run_ranks

IMAGES = 4
CONFIG = PrecisionConfig(fp8="emulated", fp8_recipe="rowwise")


def loss_and_gradients(ep: int) -> tuple[float, dict[str, np.ndarray]]:
    """One step on a fixed batch that is cut over the ranks; gradients are whole."""
    config = ParallelConfig(expert_model_parallel_size=ep)
    parallel = join(config)
    with torch.device("meta"):
        model = NucleusTransformer(SHAPE)
    apply_precision(model, CONFIG, device_type="cpu", bf16=False)
    parallelize(model, config, parallel)
    materialise(model, parallel.device, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "image_out" in name or name.endswith("router.weight"):
                put(parameter, torch.randn(parameter.shape, generator=rng.generator(1, 0, name)) * 0.3)
    generator = torch.Generator().manual_seed(0)
    tokens = GRID[0] * GRID[1]
    x, target = (torch.randn(IMAGES, tokens, SHAPE.patch_channels, generator=generator) for _ in range(2))
    sigma, text = (
        torch.rand(IMAGES, generator=generator),
        torch.randn(IMAGES, 5, SHAPE.text_dim, generator=generator),
    )
    share = IMAGES // parallel.world
    mine = slice(parallel.rank * share, (parallel.rank + 1) * share)
    velocity = model(x[mine], sigma[mine], TextFeatures(text[mine]), GRID)
    loss = (velocity - target[mine]).square().sum() / IMAGES
    loss.backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.dist
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_are_one_process(ep, tmp_path):
    """Rows keep their scales. A scale that spans tokens spans fewer of them, but it is a power of two and values are
    floating: only what rounds to a subnormal differs."""
    loss, gradients = loss_and_gradients(1)
    outcomes = run_ranks(2, loss_and_gradients, tmp_path, ep)
    assert sum(part for part, _ in outcomes) == pytest.approx(loss, rel=1e-5)
    for name, want in gradients.items():
        distance = np.linalg.norm(outcomes[0][1][name] - want) / max(np.linalg.norm(want), 1e-12)
        assert distance < 5e-3, name
