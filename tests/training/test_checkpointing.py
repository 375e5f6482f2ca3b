"""Saving and resuming a run, also when something goes wrong in the middle."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.training.checkpointing import Checkpointer
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError

SHAPE = ModelShape(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    num_key_value_heads=1,
    text_dim=24,
    latent_channels=4,
    patch_size=2,
    axes_dims_rope=(4, 6, 6),
    mlp_ratio=8.0,
    dense_moe_strategy="leave_first_block_dense",
    num_experts=4,
    moe_intermediate_dim=16,
    capacity_factors=(0.0, 2.0),
    use_sigmoid=False,
    route_scale=2.5,
)
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
        **EXTRA, "format": 1, "step": 5, "samples_seen": 20, "skipped": 1, "optimizer": {"updates": 50},
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
def test_a_damaged_newest_checkpoint_names_the_file_and_the_way_back(tmp_path, kind):
    saver = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        saver.save(make_state(step, step=step), EXTRA)
    damaged("model_truncated", tmp_path / "step_00000002")
    path = damaged(kind, tmp_path / "step_00000003")
    state = make_state(8)
    before = everything(state)
    with pytest.raises(DataError) as caught:
        saver.load_latest(state)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(f"echo step_00000001 > {tmp_path / 'latest'}")
    assert_same(everything(state), before)
    subprocess.run(message.split("run: ")[-1], shell=True, check=True)
    saver.load_latest(state)
    assert_same(everything(state), everything(make_state(1, step=1)))


def test_latest_that_names_nothing_tells_the_way_back(tmp_path):
    saver = Checkpointer(tmp_path)
    for step in (1, 2):
        saver.save(make_state(step, step=step), EXTRA)
    for content in ("step_00000009", "nonsense"):
        (tmp_path / "latest").write_text(content)
        with pytest.raises(DataError, match=rf"latest.*run: echo step_00000002 > {tmp_path / 'latest'}"):
            saver.load_latest(make_state(3))


def test_the_only_checkpoint_damaged(tmp_path):
    saver = Checkpointer(tmp_path)
    path = damaged("model_missing", saver.save(make_state(1, step=1), EXTRA))
    with pytest.raises(DataError, match=rf"{path.name}: missing; no other complete checkpoint"):
        saver.load_latest(make_state(2))


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
            DataError, match=r"step_00000002: cannot be written \(File too large\).*stay usable"
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


KILLED_IN = ("shards", "manifest", "rename", "latest")
CHILD = """
    import os, sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_checkpointing import EXTRA, KILLED_IN, Checkpointer, make_state
    from megatron_nucleus.export import native
    from megatron_nucleus.training import checkpointing

    def save_until(stage, folder):
        Checkpointer(folder).save(make_state(1, step=1), EXTRA)

        def wait(*args):
            (folder / ".pid").write_text(str(os.getpid()))
            os.replace(folder / ".pid", folder / "killme")
            time.sleep(60)

        if stage == "shards":  # the model is written, the optimizer is not
            save = checkpointing._dcp_save
            checkpointing._dcp_save = lambda t, f: wait() if f.name == "optimizer" else save(t, f)
        elif stage == "manifest":
            native.write_manifest = wait
        elif stage == "rename":
            checkpointing.os.rename = wait
        else:
            native.set_latest = wait
        Checkpointer(folder).save(make_state(2, step=2), EXTRA)

    for stage in KILLED_IN:  # forks share the seconds that the imports take
        if os.fork() == 0:
            save_until(stage, Path(sys.argv[1]) / stage)
            os._exit(0)
    print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in KILLED_IN])
"""


def test_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD).format(tests=os.path.dirname(__file__)))
    folders = {stage: tmp_path / stage for stage in KILLED_IN}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    for folder in folders.values():
        while not (folder / "killme").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int((folder / "killme").read_text()), signal.SIGKILL)
    assert child.communicate()[0].strip() == str([-signal.SIGKILL] * 4)
    for stage, folder in folders.items():
        (folder / "killme").unlink()
        left = {p.name for p in folder.iterdir()} - {"latest", "step_00000001"}
        assert left == ({"step_00000002"} if stage == "latest" else {".tmp_step_00000002"})
        saver, state = Checkpointer(folder), make_state(5)
        assert saver.load_latest(state) == EXTRA
        assert_same(everything(state), everything(make_state(1, step=1)))
        saver.save(make_state(3, step=2), EXTRA)  # the same command goes on, and cleans up
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]
        saver.load_latest(state)
        assert_same(everything(state), everything(make_state(3, step=2)))


def test_a_first_save_killed_before_latest_is_found_again(tmp_path):
    saver = Checkpointer(tmp_path)
    saver.save(make_state(4, step=4), EXTRA)
    (tmp_path / "latest").unlink()
    state = make_state(5)
    assert saver.load_latest(state) == EXTRA
    assert_same(everything(state), everything(make_state(4, step=4)))


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
