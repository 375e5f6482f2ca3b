"""A checkpoint that many ranks wrote is the same to every tool as one that a single process wrote."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nucleus.core.parallel_state import create_groups, make_layout
from megatron_nucleus.export import native
from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.load import load_model
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.types import TrainState
from tests.export.conftest import EXTRA, TINY, MomentumOnly, random_model, save_run, sharded_model
from tests.ranks import run_ranks
from tests.support import tool


def save_sharded(run: Path, ep: int, replicate: int) -> None:
    """Step 6 of a run whose experts and dense weights lie on four ranks."""
    layout = make_layout(dist.get_world_size(), experts=TINY.num_experts, ep=ep, replicate=replicate)
    ps = create_groups(layout, torch.device("cpu"), dist.get_rank(), timeout_s=60)
    model = sharded_model(TINY, 6, ps)
    state = TrainState(model, MomentumOnly(model), 6, 48)
    saver = Checkpointer(run / "checkpoints", control=ps.control)
    saver.save(state, {**EXTRA, "model": native.shape_to_dict(TINY)})


def test_the_diffusers_folder_does_not_depend_on_the_ranks(tmp_path):
    weights = random_model(TINY, seed=6)
    save_run(tmp_path / "alone", weights, 6)
    convert(tmp_path / "alone", tmp_path / "alone_hf", "hf")
    for ep, replicate in ((2, 1), (2, 2)):
        run, out = tmp_path / f"run{replicate}", tmp_path / f"hf{replicate}"
        run_ranks(4, save_sharded, tmp_path, run, ep, replicate)
        assert len(list((run / "checkpoints" / "step_00000006" / "model").iterdir())) == 4
        loaded = load_model(run).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights.state_dict().items())
        if replicate == 1:
            tool("convert_checkpoint", "--input", run, "--to", "hf", "--output", out)
        else:
            convert(run, out, "hf")
        assert_same_folder(out, tmp_path / "alone_hf")


def assert_same_folder(one: Path, other: Path) -> None:
    """Byte for byte, but for where it came from."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        if path.name != "nucleus.json":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    sides = [json.loads((folder / "nucleus.json").read_text()) for folder in (one, other)]
    assert all("checkpoints/step_00000006" in side["provenance"].pop("source") for side in sides)
    assert sides[0] == sides[1]
