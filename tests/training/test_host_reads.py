"""Outside of the log interval a training step reads the device once, in `share_step`, and uploads nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core import flow
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import Loader
from megatron_nucleus.training import step, training
from megatron_nucleus.training.step_report import share_step
from tests.training.host_reads import HostReads
from tests.training.runs import run_here

# The loss and the norm of a step, one row of numbers: every rank decides by it whether the update is applied.
ALLOWED = {("training/step_report.py:share_step", "tolist"): 1}


@pytest.fixture
def reads(monkeypatch) -> HostReads:
    """Watches every step of a run from the second on; the first fills caches, such as the rotary tables."""
    reads = HostReads()
    original = training.Loop.train_step

    def train_step(loop, loader, lr, stop):
        if loop.state.step == 0:
            return original(loop, loader, lr, stop)
        with reads.watching():
            return original(loop, loader, lr, stop)

    monkeypatch.setattr(training.Loop, "train_step", train_step)
    # Pixels, captions, noise and noise levels are made on the host on every machine.
    monkeypatch.setattr(Loader, "__next__", reads.excusing(Loader.__next__))
    monkeypatch.setattr(FeatureExtractor, "extract", reads.excusing(FeatureExtractor.extract))
    for name in ("sample_noise", "sample_sigma"):
        monkeypatch.setattr(step.flow, name, reads.excusing(getattr(flow, name)))
    return reads


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--micro-batch-size", 4, "--recompute-granularity", "full", "--routing-interval", 2),
        ("--optimizer", "adamw", "--wavelet-loss-coeff", 0.1, "--moe-z-loss-coeff", 1e-3),
    ],
    ids=["plain", "accumulated", "adamw"],
)
def test_a_step_reads_the_device_once(reads, config_file, tmp_path, flags):
    run_here(config_file, tmp_path / "run", "--train-steps", 3, *flags)
    watched = 2
    assert reads.operators > 1000 * watched
    assert dict(reads.found) == {key: count * watched for key, count in ALLOWED.items()}


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("item", lambda x: x.sum().item()),
        ("__float__", lambda x: float(x.sum())),
        ("__bool__", lambda x: bool(x.sum() > 0)),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("index_put_", lambda x: x.__setitem__(x > 0, 1.0)),
        ("tensor", lambda x: torch.tensor(3.0)),
    ],
)
def test_the_watch_sees(what, code):
    reads = HostReads()
    with reads.watching():
        code(torch.randn(4, 4))
    assert what in {name for _, name in reads.found}
    excused = HostReads()
    with excused.watching():
        excused.excusing(code)(torch.randn(4, 4))
    assert not excused.found


def test_the_watch_sees_a_backward_pass():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    reads = HostReads()
    x = torch.randn(3, requires_grad=True)
    with reads.watching():
        Reading.apply(x).sum().backward()
    assert ("outside of the package", "_local_scalar_dense") in reads.found


def test_plain_tensor_work_is_not_found():
    reads = HostReads()
    x = torch.randn(4, 4, requires_grad=True)
    with reads.watching():
        (x[torch.arange(2)] * torch.full((), 2.0)).topk(2).values.sum().backward()
    assert not reads.found
    assert reads.operators > 5


def test_share_step_is_what_reads():
    """The excuse above is for this function and not a hole: its one read is seen."""
    reads = HostReads()
    losses = step.StepLosses(*torch.ones(4).unbind())
    with reads.watching():
        share_step(losses, torch.ones((), dtype=torch.float64), False, None)
    assert dict(reads.found) == ALLOWED
