"""Saving and resuming a run, also when something goes wrong in the middle."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.training.checkpointing.step_folders import choose_latest
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.shapes import TINY

SHAPE = TINY
EXTRA = {"seed": 3, "model": native.shape_to_dict(SHAPE), "codec": {"name": "dct"}, "text_encoder": None}


def make_state(seed: int, step: int = 0, shape: ModelShape = SHAPE, optimizer: str = "muon") -> TrainState:
    """A model with random weights and an optimizer with random state."""
    model = NucleusTransformer(shape, seed=seed)
    state = TrainState(
        model, build_optimizer(model, OptimizerConfig(optimizer=optimizer)), step, 4 * step, seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *state.optimizer.tensors().values()):
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    state.optimizer.load_scalars({"updates": 10 * step})
    return state


def everything(state: TrainState) -> dict:
    tensors = {**state.model.state_dict(), **state.optimizer.tensors()}
    return {n: t.detach().clone() for n, t in tensors.items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_save_and_load_restore_every_bit_in_place(tmp_path):
    saver = Checkpointer(tmp_path / "checkpoints")
    state = make_state(1, step=1200)
    assert saver.save(state, EXTRA) == tmp_path / "checkpoints" / "step_00001200"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00001200\n"
    other = make_state(2)
    addresses = [t.data_ptr() for t in (*other.model.parameters(), *other.optimizer.tensors().values())]
    assert saver.load_latest(other) == EXTRA
    assert (other.step, other.samples_seen, other.skipped) == (1200, 4800, 1)
    assert other.optimizer.scalars() == {"updates": 12000}
    assert_same(everything(other), everything(state))
    assert [
        t.data_ptr() for t in (*other.model.parameters(), *other.optimizer.tensors().values())
    ] == addresses
    loaded = load_model(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(state.model.state_dict()))


def test_layout_and_content_of_a_step_folder(tmp_path):
    step = Checkpointer(tmp_path).save(make_state(1, step=5), EXTRA)
    native.verify(step)
    assert json.loads((step / "state.json").read_text()) == {
        **EXTRA, "format": 1, "step": 5, "samples_seen": 20, "skipped": 1, "loss_average": None,
        "optimizer": {"updates": 50},
    }  # fmt: skip
    names = {p.relative_to(step).parts[0] for p in step.rglob("*") if p.is_file()}
    assert names == {"model", "optimizer", "state.json", "manifest.json"}
    assert {p.suffix for p in step.rglob("*") if p.is_file()} == {".safetensors", ".json"}  # nothing pickled
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000005"]


def test_nothing_to_load_leaves_the_state_alone(tmp_path):
    state = make_state(1, step=3)
    before = everything(state)
    assert Checkpointer(tmp_path / "nowhere").load_latest(state) is None
    (tmp_path / "checkpoints" / ".tmp_step_00000001" / "model").mkdir(parents=True)
    assert Checkpointer(tmp_path / "checkpoints").load_latest(state) is None
    assert_same(everything(state), before)
    assert state.step == 3


def test_training_continues_as_if_never_stopped(tmp_path):
    """Steps after a resume equal steps without one, bit for bit."""

    def advance(state, steps):
        for _ in range(steps):
            state.optimizer.zero_grad()
            generator = torch.Generator().manual_seed(state.step)
            for parameter in state.optimizer.params.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            state.optimizer.step(lr=1e-2)
            state.step += 1

    straight = make_state(1)
    advance(straight, 5)
    stopped = make_state(1)
    advance(stopped, 2)
    Checkpointer(tmp_path).save(stopped, EXTRA)
    resumed = make_state(9)
    Checkpointer(tmp_path).load_latest(resumed)
    advance(resumed, 3)
    assert_same(everything(resumed), everything(straight))
    assert resumed.optimizer.scalars() == straight.optimizer.scalars()


def test_keep_last_prunes_only_after_the_new_one_is_named(tmp_path):
    saver = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        saver.save(make_state(step, step=step), EXTRA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    saver.save(make_state(2, step=2), EXTRA)  # a run that went back: never the one that latest names
    assert "step_00000002" in [p.name for p in tmp_path.iterdir()]
    assert native.resolve_checkpoint(tmp_path).name == "step_00000002"
    with pytest.raises(ConfigError, match="--keep-last-checkpoints 0"):
        Checkpointer(tmp_path, keep_last=0)


def test_pruning_counts_back_from_latest_not_from_an_abandoned_branch(tmp_path):
    saver = Checkpointer(tmp_path, keep_last=2)
    keeps_all = Checkpointer(tmp_path)
    for step in (1, 2, 3, 8, 9):
        keeps_all.save(make_state(step, step=step), EXTRA)
    native.set_latest(tmp_path, tmp_path / "step_00000003")
    saver.save(make_state(4, step=4), EXTRA)
    assert [native.step_number(p) for p in native.list_steps(tmp_path)] == [3, 4, 8, 9]
    assert [native.step_number(p) for p in native.list_branch(tmp_path)] == [3, 4]


def test_saving_a_step_again_replaces_it(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(make_state(1, step=7), EXTRA)
    saver.save(make_state(2, step=7), EXTRA)
    state = make_state(3)
    saver.load_latest(state)
    assert_same(everything(state), everything(make_state(2, step=7)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000007"]


def damaged(kind, step):
    path = {
        "model": next((step / "model").glob("*")),
        "optimizer": next((step / "optimizer").glob("*")),
        "state": step / "state.json",
        "manifest": step / "manifest.json",
    }[kind.split("_")[0]]
    if kind.endswith("missing"):
        path.unlink()
    elif kind.endswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "kind",
    ["model_missing", "model_truncated", "model_altered", "optimizer_truncated", "optimizer_altered",
     "state_missing", "state_altered", "manifest_missing", "manifest_truncated"],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_named_and_the_newest_complete_one_before_it_used(
    tmp_path, caplog, kind
):
    saver = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        saver.save(make_state(step, step=step), EXTRA)
    skipped = damaged("model_truncated", tmp_path / "step_00000002")
    path = damaged(kind, tmp_path / "step_00000003")
    state = make_state(8)
    assert saver.load_latest(state) == EXTRA
    assert_same(everything(state), everything(make_state(1, step=1)))
    assert state.step == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    for message, damage in zip(said, (path, skipped), strict=False):
        assert message.startswith("skipping a damaged checkpoint: ")
        assert str(damage) in message
    assert said[2] == f"resuming from {tmp_path / 'step_00000001'}, which is complete"
    assert native.newest_checkpoint(tmp_path).name == "step_00000003"  # untouched until the next save
    saver.save(make_state(5, step=3), EXTRA)  # takes the place of the damaged one
    native.verify(tmp_path / "step_00000003")
    Checkpointer(tmp_path).load_latest(state)
    assert_same(everything(state), everything(make_state(5, step=3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", *(f"step_0000000{i}" for i in (1, 2, 3))]


@pytest.mark.parametrize("content", ["step_00000009", "nonsense", "", None])
def test_a_damaged_latest_is_named_and_the_newest_complete_checkpoint_used(tmp_path, caplog, content):
    saver = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        saver.save(make_state(step, step=step), EXTRA)
    damaged("optimizer_altered", tmp_path / "step_00000003")
    if content is None:  # killed between the first rename and the first `latest`
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(content)
    state = make_state(8)
    assert saver.load_latest(state) == EXTRA
    assert_same(everything(state), everything(make_state(2, step=2)))
    assert str(tmp_path / "latest") in caplog.records[0].getMessage()
    assert caplog.records[-1].getMessage() == f"resuming from {tmp_path}/step_00000002, which is complete"
    saver.save(make_state(4, step=4), EXTRA)
    assert native.newest_checkpoint(tmp_path).name == "step_00000004"


def test_a_run_that_went_back_never_takes_the_steps_it_left_behind(tmp_path):
    folder = tmp_path / "checkpoints"
    saver = Checkpointer(folder)
    for step in (3, 8, 9):
        saver.save(make_state(step, step=step), EXTRA)
    assert choose_latest(tmp_path, 3) == folder / "step_00000003"
    damaged("model_altered", folder / "step_00000003")
    state = make_state(1)
    before = everything(state)
    with pytest.raises(
        DataError,
        match=r"altered.*step_00000009, which the run had left behind, is complete: .* --set-latest 9, then",
    ):
        saver.load_latest(state)
    assert_same(everything(state), before)
    choose_latest(tmp_path, 9)  # the way the message shows
    saver.load_latest(state)
    assert_same(everything(state), everything(make_state(9, step=9)))


def test_a_checkpoint_known_as_damaged_does_not_count_as_kept(tmp_path):
    keeps_all = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        keeps_all.save(make_state(step, step=step), EXTRA)
    damaged("model_altered", tmp_path / "step_00000003")
    saver, state = Checkpointer(tmp_path, keep_last=2), make_state(9)
    saver.load_latest(state)
    assert state.step == 2
    saver.save(make_state(4, step=4), EXTRA)
    assert [native.step_number(p) for p in native.list_steps(tmp_path)] == [2, 3, 4]  # 2 and 4 are usable
    saver.save(make_state(5, step=5), EXTRA)
    assert [native.step_number(p) for p in native.list_steps(tmp_path)] == [4, 5]


def test_what_cannot_be_pruned_is_no_reason_to_lose_a_save(tmp_path, monkeypatch, caplog):
    saver = Checkpointer(tmp_path, keep_last=1)
    saver.save(make_state(1, step=1), EXTRA)

    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        saver.save(make_state(2, step=2), EXTRA)
    assert ".old_step_00000001: cannot be removed (Device or resource busy)" in caplog.text
    saver.save(make_state(3, step=3), EXTRA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_the_loss_average_is_kept_and_older_checkpoints_have_none(tmp_path):
    saver, state = Checkpointer(tmp_path), make_state(1, step=1)
    state.loss_average = 0.1 + 0.2
    step = saver.save(state, EXTRA)
    other = make_state(2)
    assert saver.load_latest(other) == EXTRA
    assert other.loss_average == 0.1 + 0.2
    document = json.loads((step / "state.json").read_text())
    del document["loss_average"]
    (step / "state.json").write_text(json.dumps(document))
    native.write_manifest(step, native.describe_files(step))
    assert saver.load_latest(other) == EXTRA
    assert other.loss_average is None


def test_the_only_checkpoint_damaged(tmp_path):
    saver = Checkpointer(tmp_path)
    path = damaged("model_missing", saver.save(make_state(1, step=1), EXTRA))
    state = make_state(2)
    before = everything(state)
    with pytest.raises(DataError, match=rf"{path.name}: missing; no other complete checkpoint"):
        saver.load_latest(state)
    assert_same(everything(state), before)
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(DataError, match=r"step_00000001: missing although .*latest names it; no other"):
        saver.load_latest(state)


def test_another_model_or_optimizer_is_refused_before_loading(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(make_state(1, step=1), EXTRA)
    wide = make_state(2, shape=dataclasses.replace(SHAPE, moe_intermediate_dim=24))
    before = everything(wide)
    with pytest.raises(ConfigError, match=r"model\.moe_intermediate_dim: 24 is configured.*trained with 16"):
        saver.load_latest(wide)
    assert_same(everything(wide), before)
    with pytest.raises(ConfigError, match="optimizer tensor .* exists only in this run"):
        saver.load_latest(make_state(2, optimizer="adamw"))
    half = make_state(2)
    half.model.image_in.bfloat16()
    with pytest.raises(ConfigError, match=r"image_in\.weight is \[32, 16\] torch\.float32, this run needs"):
        saver.load_latest(half)


def test_reserved_entries_of_state_json(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        Checkpointer(tmp_path).save(make_state(1), {"step": 3})


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"step_00000001: cannot be written \(Not a directory\)"):
        Checkpointer(tmp_path / "file" / "checkpoints").save(make_state(1, step=1), EXTRA)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A real write error from the kernel: the file size limit of this process."""
    saver = Checkpointer(tmp_path)
    saver.save(make_state(1, step=1), EXTRA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            DataError,
            match=r"step_00000002: cannot be written \(File too large\); .* sees \d+ bytes free there.*stay usable",
        ):
            saver.save(make_state(2, step=2), EXTRA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    state = make_state(3)
    saver.load_latest(state)
    assert_same(everything(state), everything(make_state(1, step=1)))
    saver.save(make_state(2, step=2), EXTRA)
    assert native.resolve_checkpoint(tmp_path).name == "step_00000002"


def test_shards_of_several_ranks_load(tmp_path):
    """Shards that several ranks wrote: cut every tensor of a checkpoint in two files by rows."""
    from safetensors.torch import load_file, save_file

    saver = Checkpointer(tmp_path)
    step = saver.save(make_state(6, step=6), EXTRA)
    for part in ("model", "optimizer"):
        (file,) = (step / part).glob("*.safetensors")
        tensors = load_file(file)
        file.unlink()
        for rank in (0, 1):
            pieces, offsets = {}, {}
            for name, tensor in tensors.items():
                cut = tensor.shape[0] // 2
                pieces[name] = tensor[cut * rank : cut if rank == 0 else None].clone()
                offsets[name] = {"saved_offsets": [cut * rank] + [0] * (tensor.dim() - 1)}
            save_file(
                pieces, step / part / f"rank{rank}.safetensors", {"DCP_SHARDING_INFO": json.dumps(offsets)}
            )
    native.write_manifest(step, native.describe_files(step))
    state = make_state(7)
    saver.load_latest(state)
    assert_same(everything(state), everything(make_state(6, step=6)))
    assert_same(dict(load_model(tmp_path).state_dict()), dict(state.model.state_dict()))
    shutil.rmtree(step / "optimizer")
    assert_same(dict(load_model(tmp_path).state_dict()), dict(state.model.state_dict()))
