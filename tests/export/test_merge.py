"""Weighted averages of checkpoints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_nucleus.export import merge as merge_module
from megatron_nucleus.export import native
from megatron_nucleus.export.load import load_model
from megatron_nucleus.export.merge import merge, select_checkpoints
from megatron_nucleus.export.merge_weights import SCHEMES
from megatron_nucleus.utils.errors import ConfigError, DataError

STEPS = (100, 200, 300, 1000)


@pytest.fixture
def run(make, tmp_path):
    for step in STEPS:
        make.run(tmp_path / "run", make.model(make.shape(num_layers=2), step), step)
    return tmp_path / "run"


def merged_tensors(folder):
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("scheme", ["inverse_sqrt", "uniform", "ema"])
def test_average_equals_numpy_exactly(make, run, tmp_path, scheme):
    decay = 0.6 if scheme == "ema" else None
    report = merge(run, tmp_path / "merged", scheme, last=3, ema_decay=decay)
    models = [make.model(make.shape(num_layers=2), step).state_dict() for step in STEPS[1:]]
    age = np.array([3.0, 2.0, 1.0])
    raw = {"inverse_sqrt": age**-0.5, "uniform": age**0.0, "ema": 0.6 ** (age - 1)}[scheme]
    np.testing.assert_allclose(report["weights"], raw / raw.sum(), rtol=1e-14)
    out = merged_tensors(tmp_path / "merged")
    assert out.keys() == models[0].keys()
    for name, tensor in out.items():
        expected = sum(
            w * m[name].numpy().astype(np.float64) for w, m in zip(report["weights"], models, strict=True)
        )
        np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32))
    assert report["inputs"] == [str(run / "checkpoints" / native.step_name(s)) for s in STEPS[1:]]
    assert report["bytes"] == sum(t.numel() * 4 for t in out.values())


def test_slices_do_not_change_the_result(run, tmp_path, monkeypatch):
    merge(run, tmp_path / "a", last=4)
    monkeypatch.setattr(merge_module, "_PIECE_BYTES", 100)
    merge(run, tmp_path / "b", last=4)
    a, b = merged_tensors(tmp_path / "a"), merged_tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_checkpoint_gives_its_own_bits(make, tmp_path, dtype):
    model = make.model(make.shape(num_layers=2), 1, dtype)
    model.image_in.bias.data[0] = -0.0
    make.run(tmp_path / "run", model, 7)
    for scheme in SCHEMES[:-1]:  # all but custom
        merge(tmp_path / "run" / "checkpoints", tmp_path / scheme, scheme, last=1)
        for name, tensor in merged_tensors(tmp_path / scheme).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor.view(torch.uint8), model.state_dict()[name].view(torch.uint8))


def test_equal_checkpoints_average_to_themselves(make, tmp_path):
    model = make.model(make.shape(num_layers=2), 1)
    for step in range(1, 7):
        make.run(tmp_path / "run", model, step)
    merge(tmp_path / "run", tmp_path / "merged", last=6)
    merged = load_model(tmp_path / "merged")
    assert all(
        torch.equal(a, b)
        for a, b in zip(merged.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_bf16_average_is_the_rounded_exact_one(make, tmp_path):
    models = [make.model(make.shape(num_layers=1), s, torch.bfloat16) for s in (1, 2)]
    for step, model in enumerate(models, start=1):
        make.run(tmp_path / "run", model, step)
    merge(tmp_path / "run", tmp_path / "merged", "uniform", last=2)
    for name, tensor in merged_tensors(tmp_path / "merged").items():
        exact = (models[0].state_dict()[name].double() + models[1].state_dict()[name].double()) / 2
        assert torch.equal(tensor, exact.float().bfloat16())


def test_merged_folder_is_a_checkpoint_that_says_what_it_is(make, run, tmp_path):
    merge(run, tmp_path / "merged", "ema", steps=[1000, 100], ema_decay=0.25, max_shard_bytes=50_000)
    native.verify(tmp_path / "merged")
    state = json.loads((tmp_path / "merged" / "state.json").read_text())
    inputs = [str(run / "checkpoints" / native.step_name(s)) for s in (100, 1000)]
    assert state["merged"] == {"scheme": "ema", "inputs": inputs, "weights": [0.2, 0.8],
                               "decay_multipliers": [1.0, 0.8], "ema_decay": 0.25}  # fmt: skip
    assert (state["step"], state["samples_seen"]) == (1000, 8000)
    for key in ("codec", "text_encoder", "sampling", "seed", "versions"):
        assert state[key] == make.extra[key]
    assert "optimizer" not in state
    assert len(list((tmp_path / "merged" / "model").glob("*"))) > 1
    first, last = (make.model(make.shape(num_layers=2), s).image_in.weight.double() for s in (100, 1000))
    merged = load_model(tmp_path / "merged")
    assert torch.equal(merged.image_in.weight, (first * 0.2 + last * 0.8).float())


def test_selection(run):
    def names(**how):
        return [int(p.name.removeprefix("step_")) for p in select_checkpoints(run, **how)]

    assert names(last=2, steps=None) == [300, 1000]
    assert names(last=4, steps=None) == list(STEPS)
    assert names(last=None, steps=[300, 100]) == [100, 300]
    assert names(last=2, steps=None, until=300) == [200, 300]
    assert names(last=1, steps=None, until=100) == [100]
    assert names(last=4, steps=None, until=1000) == list(STEPS)
    cases = [
        ({"last": 5, "steps": None}, "--last 5: only 4 checkpoints exist"),
        ({"last": 0, "steps": None}, "--last 0: must be at least 1"),
        ({"last": None, "steps": [150]}, "--steps 150: no such checkpoint; there are 100, 200, 300, 1000"),
        ({"last": None, "steps": [100, 100]}, "each once"),
        ({"last": None, "steps": []}, "at least one"),
        ({"last": None, "steps": None}, "exactly one"),
        ({"last": 1, "steps": [100]}, "exactly one"),
        ({"last": 3, "steps": None, "until": 200}, "--last 3: only 2 checkpoints exist in .* up to step 200"),
        (
            {"last": 1, "steps": None, "until": 250},
            "--until 250: no such checkpoint; there are 100, 200, 300, 1000",
        ),
        ({"last": None, "steps": [100], "until": 100}, "--until 100: only with --last N"),
    ]
    for how, message in cases:
        with pytest.raises(ConfigError, match=message):
            select_checkpoints(run, **how)
    with pytest.raises(ConfigError, match="holds no step_"):
        select_checkpoints(run / "nowhere", 1, None)


def test_checkpoints_that_latest_left_behind_are_not_merged(run):
    latest = run / "checkpoints" / "latest"
    latest.write_text("step_00000200\n")
    assert [p.name for p in select_checkpoints(run, 2, None)] == ["step_00000100", "step_00000200"]
    with pytest.raises(ConfigError, match=r"--last 3: only 2 .* up to step_00000200, which latest names"):
        select_checkpoints(run, 3, None)
    with pytest.raises(ConfigError, match=r"--until 300: .* latest names; there are 100, 200$"):
        select_checkpoints(run, 1, None, until=300)  # a window of two histories
    assert [p.name for p in select_checkpoints(run, None, [300])] == ["step_00000300"]  # named: meant
    latest.write_text("nonsense")
    with pytest.raises(DataError, match="latest"):
        select_checkpoints(run, 1, None)
    latest.unlink()
    assert [p.name for p in select_checkpoints(run, 1, None)] == ["step_00001000"]


def test_a_moved_encoder_folder_is_the_same_encoder(make, run, tmp_path):
    vae = {"name": "qwen_image_vae", "path": "/a", "tiling": False, "dtype": "float32"}
    for step, spec in ((2000, vae), (2100, {**vae, "path": "/b", "tiling": True, "dtype": "bfloat16"})):
        make.run(run, make.model(make.shape(num_layers=2), 1), step, codec=spec)
    assert len(merge(run, tmp_path / "m", last=2)["inputs"]) == 2


def test_different_models_are_refused(make, run, tmp_path):
    make.run(run, make.model(make.shape(num_layers=2, text_dim=26), 1), 1100)
    with pytest.raises(
        DataError, match=r"step_00001000/state.json: another arch.* model.text_dim is 24, there 26"
    ):
        merge(run, tmp_path / "m", last=2)
    make.run(run, make.model(make.shape(num_layers=2), 1), 1200)
    make.run(
        run,
        make.model(make.shape(num_layers=2), 1),
        1300,
        codec={"name": "dct", "coefficients": [16, 16, 16]},
    )
    with pytest.raises(DataError, match=r"step_00001200.*another latent codec \(codec\)"):
        merge(run, tmp_path / "m", last=2)
    make.run(run, make.model(make.shape(num_layers=2), 1), 1350, text_encoder={"name": "other"})
    with pytest.raises(DataError, match=r"step_00001200.*another text encoder \(text_encoder\)"):
        merge(run, tmp_path / "m", steps=[1200, 1350])
    make.run(run, make.model(make.shape(num_layers=2), 1, torch.bfloat16), 1400)
    with pytest.raises(DataError, match=r"step_00001200.*float32.*bfloat16"):
        merge(run, tmp_path / "m", steps=[1200, 1400])
    assert not (tmp_path / "m").exists()


START = {"path": "/a", "step": 3, "manifest_sha256": "12ab", "optimizer": False, "samples_seen_in_all": 24}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 6}, "its seed is 5, there 6"),
        ({"data": {"manifest_hash": "def"}}, r"its data set \(data.manifest_hash\) is abc, there def"),
        (
            {"started_from": START},
            r"its start \(started_from\) is None, there path /a, step 3, manifest_sha256 12ab",
        ),
    ],
)
def test_checkpoints_of_different_runs_are_refused(make, run, tmp_path, other, message):
    make.run(run, make.model(make.shape(num_layers=2), 1), 1100, **other)
    with pytest.raises(
        DataError, match=rf"step_00001000/state.json: of another run than .*step_00001100: {message}"
    ):
        merge(run, tmp_path / "m", last=2)
    assert not (tmp_path / "m").exists()


def test_what_a_run_may_change_as_it_goes_on_may_differ_in_a_window(make, run, tmp_path):
    """Commit, versions and sampling; learning rate and batch are no part of state.json."""
    start = {"started_from": START}
    make.run(run, make.model(make.shape(num_layers=2), 1), 1100, **start)
    changed = {"git_commit": "4567", "versions": {"torch": "9"}, "sampling": {"steps": 3}}
    make.run(run, make.model(make.shape(num_layers=2), 2), 1200, **start, **changed)
    assert len(merge(run, tmp_path / "m", last=2)["inputs"]) == 2
    state = json.loads((tmp_path / "m" / "state.json").read_text())
    assert (state["git_commit"], state["started_from"]["step"]) == ("4567", 3)  # the newest's


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_name_tensor_and_checkpoint(make, run, tmp_path, value):
    model = make.model(make.shape(num_layers=2), 1)
    model.blocks[1].moe.experts.down.data[2, 3, 4] = value
    make.run(run, model, 400)
    with pytest.raises(
        DataError, match=r"step_00000400.*blocks\.1\.moe\.experts\.down holds values.*not finite"
    ):
        merge(run, tmp_path / "merged", last=3)
    assert not (tmp_path / "merged").exists()
    merge(run, tmp_path / "merged", steps=[300, 1000])


def test_damaged_input_is_named(make, run, tmp_path):
    file = next((run / "checkpoints" / "step_00000300" / "model").glob("*"))
    make.flip(file)
    with pytest.raises(DataError, match=r"step_00000300.*altered"):
        merge(run, tmp_path / "merged", last=2)
    file.unlink()
    with pytest.raises(DataError, match=r"step_00000300.*missing"):
        merge(run, tmp_path / "merged", last=2)
    assert not (tmp_path / "merged").exists()
