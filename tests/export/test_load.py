"""Models from checkpoint folders."""

from __future__ import annotations

import pytest
import torch

import megatron_nucleus as mn
from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.load import load_model, load_weights, read_description
from megatron_nucleus.utils.errors import ConfigError, DataError


def velocity(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 6, 16, generator=generator).to(dtype)
    text = torch.randn(2, 5, 24, generator=generator).to(dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([0.2, 0.7]), model.project_text(text, None, grid=(3, 2)), (3, 2))


def test_every_kind_of_folder_gives_the_same_model(make, tmp_path):
    model = make.model(make.shape(), 21).eval()
    step = make.run(tmp_path / "run", model, 9)
    convert(step, tmp_path / "hf", "hf", max_shard_bytes=40_000)
    convert(step, tmp_path / "pipeline" / "transformer", "hf")
    convert(tmp_path / "hf", tmp_path / "native", "native")
    expected = velocity(model)
    for path in (
        tmp_path / "run",
        step.parent,
        step,
        str(tmp_path / "hf"),
        tmp_path / "pipeline",
        tmp_path / "native",
    ):
        loaded = mn.load_model(path)
        assert not loaded.training
        assert not any(m.training for m in loaded.modules())
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype
            for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
        assert torch.equal(velocity(loaded), expected)
        trainable = {n: p.requires_grad for n, p in loaded.named_parameters()}
        assert trainable == {n: p.requires_grad for n, p in model.named_parameters()}


def test_dtype_converts_and_none_keeps(make, tmp_path):
    model = make.model(make.shape(), 22)
    make.run(tmp_path / "run", model, 9)
    half = load_model(tmp_path / "run", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, model.state_dict()[name].bfloat16())
    assert velocity(half, torch.bfloat16).isfinite().all()
    with pytest.raises(ConfigError, match=r"dtype torch\.int8"):
        load_model(tmp_path / "run", dtype=torch.int8)


def test_descriptions(make, tmp_path):
    step = make.run(tmp_path / "run", make.model(make.shape(), 23), 1200)
    description = read_description(tmp_path / "run")
    assert (description.kind, description.step, description.path) == ("native", 1200, step)
    assert description.provenance["samples_seen"] == 8 * 1200
    make.diffusers(make.shape(), 1).save_pretrained(tmp_path / "pipe" / "transformer")
    bare = read_description(tmp_path / "pipe")
    assert (bare.kind, bare.codec, bare.text_encoder, bare.sampling, bare.step) == (
        "diffusers",
        None,
        None,
        {},
        None,
    )
    for part in ("vae", "text_encoder"):
        (tmp_path / "pipe" / part).mkdir()
        (tmp_path / "pipe" / part / "config.json").write_text("{}")
    full = read_description(tmp_path / "pipe")
    assert full.codec == {"name": "qwen_image_vae", "path": str(tmp_path / "pipe")}
    assert full.text_encoder == {"name": "qwen3_vl", "path": str(tmp_path / "pipe")}
    assert full.sampling["guidance"] == 4.0
    assert full.shape == make.shape()


def test_damage_is_reported_before_a_model_exists(make, tmp_path):
    for step in (1, 2):
        make.run(tmp_path / "run", make.model(make.shape(num_layers=2), step), step)
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    make.flip(newest / "state.json")
    with pytest.raises(
        DataError, match=r"step_00000002/state\.json: damaged .*use .*step_00000001, which is complete"
    ):
        load_model(tmp_path / "run")
    (newest / "state.json").unlink()
    with pytest.raises(DataError, match=r"state\.json: missing, .*step_00000001"):
        load_model(tmp_path / "run")
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_model(tmp_path / "empty")


def test_weights_of_another_architecture_name_the_tensor(make, tmp_path):
    """A state.json that does not belong to its weights."""
    from megatron_nucleus.export import native

    model = make.model(make.shape(), 3)
    make.run(tmp_path / "a", model, 1, model=native.shape_to_dict(make.shape(text_dim=25)))
    with pytest.raises(
        DataError, match=r"tensor text_norm\.weight has shape \[24\], the architecture needs \[25\]"
    ):
        load_model(tmp_path / "a")
    make.run(tmp_path / "b", model, 1, model=native.shape_to_dict(make.shape(dense_moe_strategy="all_moe")))
    with pytest.raises(DataError, match=r"unexpected tensor blocks\.0\.feed_forward"):
        load_model(tmp_path / "b")


def test_load_weights_fills_an_existing_model_in_place(make, tmp_path):
    source = make.model(make.shape(), 31)
    make.run(tmp_path / "run", source, 5)
    convert(tmp_path / "run", tmp_path / "hf", "hf", dtype="bfloat16")
    target = make.model(make.shape(), 32)
    addresses = {n: p.data_ptr() for n, p in target.named_parameters()}
    assert load_weights(target, tmp_path / "hf").step == 5
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.state_dict()[name].bfloat16().float())
        assert parameter.data_ptr() == addresses[name]
    before = velocity(target)
    for other, message in (
        (make.shape(num_layers=4), "exists only in the checkpoint"),
        (make.shape(num_layers=6), "exists only in the model"),
    ):
        with pytest.raises(DataError, match=message):
            load_weights(make.model(other, 0), tmp_path / "hf")
    wide = make.model(make.shape(text_dim=30), 0)
    kept = wide.image_in.weight.clone()
    with pytest.raises(DataError, match=r"txt_norm|text_norm"):
        load_weights(wide, tmp_path / "run")
    assert torch.equal(wide.image_in.weight, kept)
    assert torch.equal(velocity(target), before)
