"""A window that four ranks wrote merges in one process as one that a single process wrote, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.parallel_state import create_groups, make_layout
from megatron_nucleus.export import merge as merge_module
from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.export.merge import merge
from megatron_nucleus.export.tensor_store import TensorStore
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.types import TrainState
from tests.export.conftest import EXTRA, TINY, MomentumOnly, random_model, save_run, sharded_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = (3, 5, 6, 9)


class OneNumber(MomentumOnly):
    """Hardly any optimizer state: these tests are about weights."""

    def __init__(self):
        self.state, self.updates = {"momentum": torch.zeros(1)}, 0


def save_window(run: Path, shape: ModelShape, ep: int, keep: dict) -> None:
    """Steps `STEPS` of a run over all ranks; the weights of a step are random with the step as seed."""
    layout = make_layout(dist.get_world_size(), experts=shape.num_experts, ep=ep, replicate=1)
    ps = create_groups(layout, torch.device("cpu"), dist.get_rank(), timeout_s=60)
    saver = Checkpointer(run / "checkpoints", control=ps.control, **keep)
    for step in STEPS:
        model = sharded_model(shape, step, ps)
        saver.save(TrainState(model, OneNumber(), step, 8 * step), extra(shape))
    saver.wait()


def extra(shape: ModelShape) -> dict:
    return {**EXTRA, "model": native.shape_to_dict(shape)}


@pytest.mark.parametrize(
    ("ep", "keep"),
    [(4, {}), (2, {}), (4, {"keep_last": 1, "keep_last_weights": 3, "asynchronous": True})],
    ids=["ep 4", "ep 2 x efsdp 2", "weights alone, saved beside the training"],
)
def test_the_merged_model_does_not_depend_on_the_ranks(tmp_path, ep, keep):
    for step in STEPS:
        save_run(tmp_path / "alone", random_model(TINY, step), step)
    run_ranks(4, save_window, tmp_path, tmp_path / "run", TINY, ep, keep)
    steps = native.list_steps(tmp_path / "run" / "checkpoints")
    assert [native.step_number(step) for step in steps] == list(STEPS)
    assert [native.holds_optimizer(step) for step in steps] == [not keep, not keep, not keep, True]
    assert [(step / "optimizer").exists() for step in steps] == [not keep, not keep, not keep, True]
    assert all(len(list((step / "model").iterdir())) == 4 for step in steps)
    oldest, first = load_model(steps[0]).state_dict(), random_model(TINY, STEPS[0]).state_dict()
    assert all(torch.equal(oldest[name], value) for name, value in first.items())
    reports = {
        name: merge(tmp_path / name, tmp_path / f"{name}_m", "cosine", last=4) for name in ("alone", "run")
    }
    assert reports["run"]["weights"] == reports["alone"]["weights"]
    merged = {name: load_model(tmp_path / f"{name}_m").state_dict() for name in ("alone", "run")}
    thetas = [random_model(TINY, step).state_dict() for step in STEPS]
    for name, value in merged["run"].items():
        assert torch.equal(value, merged["alone"][name])
        terms = [w * t[name].double() for w, t in zip(reports["run"]["weights"], thetas, strict=True)]
        assert torch.equal(value, sum(terms).float())


def test_pieces_of_several_ranks_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Whole tensors of a window would need memory for the model times the checkpoints."""
    run_ranks(4, save_window, tmp_path, tmp_path / "run", TINY, 4, {})
    limit_bytes, reads = 2048, []
    read_rows = TensorStore.read_rows

    def recorded(self, name, start, stop):
        rows = read_rows(self, name, start, stop)
        reads.append((name, rows.numel() * rows.element_size(), stop - start))
        return rows

    monkeypatch.setattr(merge_module, "_PIECE_BYTES", limit_bytes)
    monkeypatch.setattr(TensorStore, "read_rows", recorded)
    monkeypatch.setattr(TensorStore, "read", None)
    report = merge(tmp_path / "run", tmp_path / "merged", last=4)
    assert report["largest_tensor_bytes"] > 4 * limit_bytes
    assert all(nbytes <= limit_bytes or rows == 1 for _, nbytes, rows in reads)
    assert sum(nbytes for _, nbytes, _ in reads) == len(STEPS) * report["bytes"]  # everything once
