"""Outside of the log interval a training step makes the host wait for the device once, in `share_step`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.clip import clip_gradients, local_square_sum
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import Loader
from megatron_nucleus.training import training
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.diagnostics import Diagnostics
from megatron_nucleus.training.step import forward_backward
from megatron_nucleus.types import Batch, TextFeatures
from megatron_nucleus.utils import config as cfg
from tests.shapes import TINY
from tests.training.runs import run_here

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def sync_mode(mode: str):
    """``error``: torch raises where the host would wait."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def tiny_batch(device: str, images: int = 4, grid: tuple[int, int] = (4, 6)) -> Batch:
    latents = torch.randn(images, grid[0] * grid[1], TINY.patch_channels, device=device)
    mask = torch.arange(5, device=device) < torch.tensor([5, 3, 4, 1], device=device)[:, None]
    text = TextFeatures(torch.randn(images, 5, TINY.text_dim, device=device), mask)
    return Batch("square", tuple(range(images)), latents, text, grid)


def make_step(optimizer: str, bf16: bool) -> tuple[Callable[[int], None], list[torch.nn.Parameter]]:
    """(a step without agreement of the ranks, by number; what it trains)."""
    device = torch.device("cuda")
    model = NucleusTransformer(TINY, resolve_kernels(device_type="cuda")).to(device)
    values = {
        "data": {"data_path": "none"},
        "training": {"bf16": bf16},
        "losses": {"wavelet_loss_coeff": 0.1},
    }
    run = cfg.from_dict(RunConfig, values, where="test")
    updates = build_optimizer(model, OptimizerConfig(optimizer=optimizer))
    params = list(updates.params.values())
    diagnostics = Diagnostics(TINY, device, 1, None)
    batch = tiny_batch("cuda")

    def step(number: int) -> None:
        diagnostics.begin_step(number)
        updates.zero_grad()
        forward_backward(model, batch, run, 1.0, observe=diagnostics.observe)
        local_square_sum(params)
        clip_gradients(params, 1.0)
        updates.step(1e-3)

    for number in range(1, 4):  # fills caches: rotary tables, autotuning, library handles
        step(number)
    torch.cuda.synchronize()
    return step, params


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("bf16", [True, False])
def test_forward_backward_clip_and_update_never_wait(optimizer, bf16):
    step, params = make_step(optimizer, bf16)
    before = params[0].detach().clone()
    with sync_mode("error"):
        for number in range(4, 6):
            step(number)
    assert not torch.equal(params[0], before)


def test_nothing_is_copied_from_pageable_memory():
    """Such a copy may wait for all that is queued, and the mode of the other tests does not see it."""
    step, _ = make_step("muon", True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(4)
        torch.cuda.synchronize()
    copies = {event.name for event in profile.events() if event.name.startswith("Memcpy")}
    assert any("Pinned -> Device" in name for name in copies), "the noise"
    assert not [name for name in copies if "Pageable" in name]


def test_the_mode_sees_a_read():
    x = torch.ones(3, device="cuda")
    with sync_mode("error"), pytest.raises(RuntimeError, match="synchronizing"):
        float(x.sum())


def test_a_whole_step_waits_in_share_step_alone(config_file, tmp_path, monkeypatch):
    def unwatched(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with sync_mode("default"):
                return function(*args, **kwargs)

        return call

    watched = []
    original = training.Loop.train_step

    def train_step(loop, loader, lr, stop):
        if loop.state.step < 2:
            return original(loop, loader, lr, stop)
        with sync_mode("error"):
            watched.append(loop.state.step)
            return original(loop, loader, lr, stop)

    monkeypatch.setattr(training.Loop, "train_step", train_step)
    monkeypatch.setattr(training, "share_step", unwatched(training.share_step))
    # Pictures and captions become features on their way in; that is the data path's time, not the step's.
    monkeypatch.setattr(Loader, "__next__", unwatched(Loader.__next__))
    monkeypatch.setattr(FeatureExtractor, "extract", unwatched(FeatureExtractor.extract))
    run_here(config_file, tmp_path / "run", "--device", "cuda", "--train-steps", 5, "--micro-batch-size", 4)
    assert watched == [2, 3, 4]
