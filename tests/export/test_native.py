"""The layout of native checkpoints: finding, checking, describing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_nucleus.export import native
from megatron_nucleus.utils.errors import ConfigError, DataError


@pytest.fixture
def run(make, tmp_path):
    for step in (100, 200, 1200):
        make.run(tmp_path / "run", make.model(make.shape(num_layers=2), step), step)
    return tmp_path / "run"


def test_every_way_to_name_a_checkpoint(run):
    newest = run / "checkpoints" / "step_00001200"
    for path in (run, str(run), run / "checkpoints", run / "checkpoints" / "latest", newest):
        assert native.resolve_checkpoint(path) == newest
    older = run / "checkpoints" / "step_00000100"
    assert native.resolve_checkpoint(older) == older
    (run / "checkpoints" / "latest").write_text("step_00000200\n")
    assert native.resolve_checkpoint(run).name == "step_00000200"
    (run / "checkpoints" / "latest").unlink()
    assert native.resolve_checkpoint(run) == newest


def test_steps_sort_by_number(run):
    steps = run / "checkpoints"
    shutil.copytree(steps / "step_00000100", steps / "step_123456789")
    (steps / "step_x").mkdir()
    (steps / ".tmp_step_00000300").mkdir()
    names = [p.name for p in native.list_steps(steps)]
    assert names == ["step_00000100", "step_00000200", "step_00001200", "step_123456789"]


def test_nothing_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        native.resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        native.resolve_checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        native.resolve_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("content", ["../../etc", "", "step_1", "\0\xff"])
def test_damaged_latest(run, content):
    (run / "checkpoints" / "latest").write_text(content)
    with pytest.raises(DataError, match=r"latest: should hold .*use .*step_00001200, which is complete"):
        native.resolve_checkpoint(run)


def test_latest_names_a_missing_folder(run):
    shutil.rmtree(run / "checkpoints" / "step_00001200")
    with pytest.raises(DataError, match=r"step_00001200: missing .*use .*step_00000200, which is complete"):
        native.resolve_checkpoint(run)


def test_the_order_in_which_a_run_tries_to_resume(run):
    folder = run / "checkpoints"

    def order():
        steps, problem = native.resume_order(folder)
        return [native.step_number(step) for step in steps], problem

    assert order() == ([1200, 200, 100], None)
    native.set_latest(folder, folder / "step_00000200")  # the run went back: 1200 is not of its history
    assert order() == ([200, 100], None)
    native.set_latest(folder, folder / "step_00000300")
    assert order() == (
        [200, 100],
        f"{folder / 'step_00000300'}: missing although {folder / 'latest'} names it",
    )
    (folder / "latest").write_bytes(b"\xff\x00")
    steps, problem = order()
    assert steps == [1200, 200, 100]
    assert problem.startswith(f"{folder / 'latest'}: should hold a name such as step_00001200")
    (folder / "latest").unlink()
    assert order() == ([1200, 200, 100], f"{folder / 'latest'}: missing")


def test_a_share_of_the_files_is_checked_alone(run, make):
    step = run / "checkpoints" / "step_00001200"
    listed = native.listed_files(step)
    assert {name.split("/")[0] for name in listed} == {"model", "optimizer", "state.json"}
    bad = damage("altered", step, make.flip).relative_to(step).as_posix()
    native.check_files(step, {name: entry for name, entry in listed.items() if name != bad})
    native.check_files(step, {bad: listed[bad]}, checksums=False)
    with pytest.raises(DataError, match=r"altered since it was written"):
        native.check_files(step, {bad: listed[bad]})
    assert not native.is_complete(step)
    assert native.is_complete(run / "checkpoints" / "step_00000200")


def damage(kind, step, flip):
    model = next((step / "model").glob("*.safetensors"))
    if kind == "removed":
        model.unlink()
    elif kind == "truncated":
        model.write_bytes(model.read_bytes()[:-10])
    elif kind == "altered":
        flip(model)
    elif kind == "unlisted":
        shutil.copy(model, step / "model" / "extra.safetensors")
        return step / "model" / "extra.safetensors"
    elif kind == "optimizer":
        model = next((step / "optimizer").glob("*.safetensors"))
        model.unlink()
    return model


@pytest.mark.parametrize("kind", ["removed", "truncated", "altered", "unlisted", "optimizer"])
def test_verify_names_the_damaged_file(make, run, kind):
    step = run / "checkpoints" / "step_00001200"
    native.verify(step)
    path = damage(kind, step, make.flip)
    with pytest.raises(DataError) as caught:
        native.verify(step)
    assert str(path) in str(caught.value)
    if kind == "altered":
        native.verify(step, checksums=False)
    if kind == "optimizer":
        native.verify(step, parts=("model/", "state.json"))
    with pytest.raises(DataError, match=r"use .*step_00000200, which is complete"):
        native.verify_or_advise(step, ("model/", "optimizer/"))


def test_advice_skips_damaged_ones_and_admits_when_nothing_is_left(make, run):
    steps = native.list_steps(run / "checkpoints")
    damage("truncated", steps[1], make.flip)
    assert native.find_complete(steps[2]) == steps[0]
    damage("removed", steps[2], make.flip)
    assert native.find_complete(steps[0]) is None
    assert "no other complete checkpoint" in native.advice(steps[0])


def test_manifest_and_state_must_be_readable(run):
    step = run / "checkpoints" / "step_00001200"
    manifest, state = step / "manifest.json", step / "state.json"
    good = manifest.read_text()
    for content in (
        "{",
        "[]",
        '{"files": 3}',
        '{"files": {"a": {}}}',
        '{"files": {"../a": {"bytes": 1, "sha256": ""}}}',
    ):
        manifest.write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            native.verify(step)
    manifest.write_text(good)
    state.write_text(json.dumps({"format": 2}))
    with pytest.raises(DataError, match="format 2, this version reads 1"):
        native.read_state(step)
    manifest.unlink()
    with pytest.raises(DataError, match=r"manifest\.json: missing"):
        native.verify(step)


def test_manifest_lists_sizes_and_checksums(run):
    import hashlib

    step = run / "checkpoints" / "step_00001200"
    files = json.loads((step / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(files) == on_disk
    for name, entry in files.items():
        content = (step / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_open_tensors_gives_the_saved_values(make, run):
    model = make.model(make.shape(num_layers=2), 1200)
    store = native.open_tensors(run / "checkpoints" / "step_00001200")
    state = model.state_dict()
    assert sorted(store.names()) == sorted(state)
    assert all(torch.equal(store.read(name), value) for name, value in state.items())


def test_shape_dictionary_round_trip_and_errors(make, tmp_path):
    shape = make.shape()
    values = json.loads(json.dumps(native.shape_to_dict(shape)))
    assert native.shape_from_dict(values, tmp_path) == shape
    with pytest.raises(DataError, match="num_layerz"):
        native.shape_from_dict({**values, "num_layerz": 2}, tmp_path)
    with pytest.raises(DataError, match=r"model\.num_experts"):
        native.shape_from_dict({**values, "num_experts": 0}, tmp_path)
    with pytest.raises(DataError, match="no architecture"):
        native.shape_from_dict(None, tmp_path)
