"""Native <-> diffusers, bit for bit in both directions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nucleus.core.models.presets import DENSE_STRATEGIES
from megatron_nucleus.export import convert as convert_module
from megatron_nucleus.export import native
from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.load import load_model, read_description
from megatron_nucleus.utils.errors import ConfigError, DataError


def tensors_of(folder):
    """All tensors of a folder of whole safetensors files, read by the safetensors library."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(load_file(file))
    return out


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("strategy", DENSE_STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_to_native_to_diffusers_is_identical(make, tmp_path, strategy, dtype):
    theirs = make.diffusers(make.shape(dense_moe_strategy=strategy), 3).to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert(tmp_path / "hf", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "hf", max_shard_bytes=50_000)
    same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    ignored = ("_diffusers_version", "use_grouped_mm")
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back")]
    assert {k: v for k, v in configs[0].items() if k not in ignored} == {
        k: v for k, v in configs[1].items() if k not in ignored
    }


def test_single_file_and_pipeline_folder_as_input(make, tmp_path):
    theirs = make.diffusers(make.shape(), 4)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    for i, source in enumerate((tmp_path / "pipeline", tmp_path / "pipeline" / "transformer")):
        convert(source, tmp_path / f"n{i}", "native")
        convert(tmp_path / f"n{i}", tmp_path / f"h{i}", "hf")
        same(theirs.state_dict(), tensors_of(tmp_path / f"h{i}"))


def test_exported_folder_opens_in_diffusers_and_halves_change_places(make, tmp_path):
    from diffusers import NucleusMoEImageTransformer2DModel

    model = make.model(make.shape(), 11)
    make.run(tmp_path / "run", model, 30)
    report = convert(tmp_path / "run", tmp_path / "hf", "hf", max_shard_bytes=100_000)
    theirs = NucleusMoEImageTransformer2DModel.from_pretrained(tmp_path / "hf")
    state, ours = theirs.state_dict(), model.state_dict()
    assert report["tensors"] == len(state) == len(ours)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["bytes"] == 4 * report["parameters"]
    assert report["shards"] == len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    gate, up = ours["blocks.0.feed_forward.gate_up.weight"].chunk(2)
    assert torch.equal(state["transformer_blocks.0.img_mlp.net.0.proj.weight"], torch.cat([up, gate]))
    gate, up = ours["blocks.2.moe.shared_expert.gate_up.weight"].chunk(2)
    assert torch.equal(
        state["transformer_blocks.2.img_mlp.shared_expert.net.0.proj.weight"], torch.cat([up, gate])
    )
    experts = state["transformer_blocks.3.img_mlp.experts.gate_up_proj"]
    assert experts.shape == (4, 32, 32)  # 2F == D
    assert torch.equal(experts, ours["blocks.3.moe.experts.gate_up"])
    assert not torch.equal(experts, experts.transpose(1, 2))
    assert torch.equal(state["img_in.weight"], ours["image_in.weight"])
    assert torch.equal(state["norm_out.linear.bias"], ours["out_modulation.bias"])


def test_same_velocity_as_diffusers_after_conversion(make, tmp_path):
    theirs = make.diffusers(make.shape(), 8).eval()
    for parameter in theirs.parameters():
        parameter.data.mul_(0.1)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", "native")
    ours = load_model(tmp_path / "native")
    latents, text, sigma = torch.randn(2, 6, 16), torch.randn(2, 7, 24), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = theirs(latents, [(1, 2, 3)], text, None, sigma).sample
        velocity = ours(latents, sigma, ours.project_text(text, None, grid=(2, 3)), (2, 3))
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_native_to_diffusers_to_native_keeps_bits_and_description(make, tmp_path):
    model = make.model(make.shape(), 12)
    step = make.run(tmp_path / "run", model, 40)
    convert(step, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "native", max_shard_bytes=30_000)
    same(model.state_dict(), tensors_of(tmp_path / "again" / "model"))
    native.verify(tmp_path / "again")
    assert not (tmp_path / "again" / "optimizer").exists()
    for folder in (step, tmp_path / "hf", tmp_path / "again"):
        description = read_description(folder)
        assert description.shape == model.shape
        assert description.codec == make.extra["codec"]
        assert description.text_encoder == make.extra["text_encoder"]
        assert description.sampling == make.extra["sampling"]
        assert description.step == 40
        for key in ("seed", "data", "git_commit", "versions"):
            assert description.provenance[key] == make.extra[key]


def test_native_half_precision_and_mixed_dtypes_survive(make, tmp_path):
    model = make.model(make.shape(), 13, torch.float16)
    model.text_norm.float()
    make.run(tmp_path / "run", model, 1)
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    exported = tensors_of(tmp_path / "hf")
    assert exported["txt_norm.weight"].dtype == torch.float32
    assert exported["img_in.weight"].dtype == torch.float16
    convert(tmp_path / "hf", tmp_path / "native", "native")
    same(model.state_dict(), tensors_of(tmp_path / "native" / "model"))


def test_dtype_converts_every_value(make, tmp_path):
    model = make.model(make.shape(), 14)
    make.run(tmp_path / "run", model, 1)
    report = convert(tmp_path / "run", tmp_path / "hf", "hf", dtype="bfloat16")
    assert report["bytes"] == 2 * report["parameters"]
    convert(tmp_path / "hf", tmp_path / "native", "native")
    same({n: p.bfloat16() for n, p in model.state_dict().items()}, tensors_of(tmp_path / "native" / "model"))


def test_a_value_beyond_fp16_is_refused(make, tmp_path):
    model = make.model(make.shape(), 15)
    model.image_out.weight.data[3, 2] = 1e5
    make.run(tmp_path / "run", model, 1)
    with pytest.raises(DataError, match=r"image_out\.weight holds 100000, more than torch\.float16"):
        convert(tmp_path / "run", tmp_path / "hf", "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("piece_bytes", [1, 1000])
def test_slices_of_any_size_give_the_same_file(make, tmp_path, monkeypatch, piece_bytes):
    from megatron_nucleus.export.tensor_store import row_ranges

    make.diffusers(make.shape(num_layers=2), 16).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole", "native")
    monkeypatch.setattr(convert_module, "row_ranges", lambda i, a, b: row_ranges(i, a, b, piece_bytes))
    convert(tmp_path / "hf", tmp_path / "sliced", "native")
    file = "model/model-00001-of-00001.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "sliced" / file).read_bytes()


def test_output_must_be_new(make, tmp_path):
    make.diffusers(make.shape(num_layers=1), 0).save_pretrained(tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match=f"--output .*{name}"):
            convert(tmp_path / "hf", tmp_path / name, "native")
    with pytest.raises(ConfigError, match="file is a file; name a new folder"):
        convert(tmp_path / "hf", tmp_path / "file" / "x", "native")
    assert (tmp_path / "full" / "keep").read_text() == "mine"
    convert(tmp_path / "hf", tmp_path / "empty", "native")
    load_model(tmp_path / "empty")


def test_interruption_leaves_nothing(make, tmp_path):
    make.diffusers(make.shape(), 0).save_pretrained(tmp_path / "hf")

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", "native", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_progress_counts_every_byte(make, tmp_path):
    make.diffusers(make.shape(), 0).save_pretrained(tmp_path / "hf")
    seen = []
    report = convert(tmp_path / "hf", tmp_path / "out", "native", progress=lambda *pair: seen.append(pair))
    assert seen[-1] == (report["bytes"], report["bytes"])
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def damaged_cases(folder):
    """Edits of a single-file diffusers folder, each with the message it must give."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    q = "transformer_blocks.1.attn.to_q.weight"

    def write(changes):
        kept = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(kept, file, metadata={"format": "pt"})

    yield lambda: write({q: None}), rf"tensor {q} is missing"
    yield lambda: write({"lora.down": torch.ones(1)}), "unexpected tensor lora.down"
    yield lambda: write({q: torch.ones(32, 31)}), rf"tensor {q} has shape \[32, 31\].*\[32, 32\]"
    yield lambda: write({q: torch.ones(32, 32, dtype=torch.int64)}), rf"tensor {q} has dtype torch.int64"
    yield (
        lambda: file.write_bytes(file.read_bytes()[:-4]),
        r"diffusion_pytorch_model\.safetensors: .*announces",
    )
    yield file.unlink, r"diffusion_pytorch_model\.safetensors: missing"
    yield lambda: (folder / "diffusion_pytorch_model.bin").write_bytes(b""), "pickled weights are never read"
    yield lambda: (folder / "config.json").write_text("{"), r"config\.json: damaged"


def test_damaged_diffusers_folders_are_refused(make, tmp_path):
    make.diffusers(make.shape(num_layers=2), 0).save_pretrained(tmp_path / "hf")
    for edit, message in damaged_cases(tmp_path / "hf"):
        edit()
        with pytest.raises(DataError, match=message):
            convert(tmp_path / "hf", tmp_path / "out", "native")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_sharded_folder_with_a_missing_shard_or_bad_index(make, tmp_path):
    make.diffusers(make.shape(), 0).save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    index = tmp_path / "hf" / "diffusion_pytorch_model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("00001-of", "../../1-of"))
    with pytest.raises(DataError, match="outside of its folder"):
        convert(tmp_path / "hf", tmp_path / "out", "native")
    index.write_text('{"weight_map": []}')
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        convert(tmp_path / "hf", tmp_path / "out", "native")
    index.write_text(good)
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: missing"):
        convert(tmp_path / "hf", tmp_path / "out", "native")


def test_damaged_native_checkpoint_is_refused_with_an_alternative(make, tmp_path):
    for step in (1, 2):
        make.run(tmp_path / "run", make.model(make.shape(num_layers=2), step), step)
    file = next((tmp_path / "run" / "checkpoints" / "step_00000002" / "model").glob("*"))
    make.flip(file)
    with pytest.raises(DataError, match=rf"{file.name}: altered .*use .*step_00000001, which is complete"):
        convert(tmp_path / "run", tmp_path / "out", "hf")
    convert(tmp_path / "run", tmp_path / "unchecked", "hf", checksums=False)
    shutil.rmtree(file.parent.parent / "optimizer")  # not needed to convert
    convert(tmp_path / "run", tmp_path / "lean", "hf", checksums=False)


def test_bad_arguments(make, tmp_path):
    with pytest.raises(ConfigError, match="--to onnx"):
        convert(tmp_path, tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match="--dtype int8"):
        convert(tmp_path, tmp_path / "out", "hf", dtype="int8")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        convert(tmp_path, tmp_path / "out", "hf")
    with pytest.raises(ConfigError, match="no such folder"):
        convert(tmp_path / "gone", tmp_path / "out", "hf")


def test_full_disk_is_refused_before_anything_is_written(make, tmp_path, monkeypatch):
    from megatron_nucleus.utils import staging

    make.diffusers(make.shape(num_layers=1), 0).save_pretrained(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match="the disk has 1000 free"):
        convert(tmp_path / "hf", tmp_path / "out", "native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
