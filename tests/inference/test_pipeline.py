"""`Pipeline` and `load_pipeline` with the embedded encoders: what a picture depends on, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from megatron_nucleus.data.encoders import EncoderConfig, build_codec, build_text_encoder
from megatron_nucleus.export import native
from megatron_nucleus.inference import pipeline as pipeline_module
from megatron_nucleus.inference.pipeline import Pipeline, load_pipeline
from megatron_nucleus.inference.sampler import SamplerConfig
from megatron_nucleus.utils.errors import ConfigError, DataError

PROMPTS = ["a red circle", "two blue squares", "", "a green triangle to the left of a red circle"]


def pixels(images):
    return np.stack([np.asarray(image, np.int16) for image in images])


def near(a, b):
    """Equal but for rounding: a batch may change the last bits, hence now and then one grey level."""
    return np.abs(pixels(a) - pixels(b)).max() <= 1


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return load_pipeline(checkpoint, device="cpu")


def draw(pipeline, prompts=PROMPTS, **options):
    return pipeline.generate(prompts, progress=False, **options)


def test_defaults_come_from_the_checkpoint(pipeline):
    assert pipeline.sampling == SamplerConfig(steps=3, guidance=3.0, shift=2.0, height=32, width=40)
    images = draw(pipeline)
    assert [image.size for image in images] == [(40, 32)] * 4
    assert all(image.mode == "RGB" for image in images)
    explicit = draw(pipeline, height=32, width=40, steps=3, guidance=3.0, shift=2.0, seeds=[0, 1, 2, 3])
    assert np.array_equal(pixels(images), pixels(explicit))
    for change in ({"steps": 4}, {"guidance": 1.0}, {"shift": 1.0}, {"negative_prompts": "red"}):
        assert not near(images, draw(pipeline, **change)), change


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(pipeline, batch_size):
    assert near(draw(pipeline), draw(pipeline, batch_size=batch_size))


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipeline):
    images = draw(pipeline, seeds=[5, 6, 7, 8])
    order = [2, 0, 3, 1]
    again = draw(pipeline, [PROMPTS[i] for i in order], seeds=[[5, 6, 7, 8][i] for i in order])
    assert near([images[i] for i in order], again)
    assert not near(draw(pipeline, PROMPTS[:1], seeds=[5]), draw(pipeline, PROMPTS[:1], seeds=[6]))
    assert not near(draw(pipeline, PROMPTS[:1], seeds=[5]), draw(pipeline, PROMPTS[1:2], seeds=[5]))


def test_negative_prompts_one_for_all_or_one_each(pipeline):
    one = draw(pipeline, negative_prompts="blue")
    each = draw(pipeline, negative_prompts=["blue"] * 4)
    assert np.array_equal(pixels(one), pixels(each))
    mixed = draw(pipeline, negative_prompts=["blue", "", "blue", ""])
    plain = draw(pipeline)
    assert near([mixed[0], mixed[2]], [one[0], one[2]])
    assert near([mixed[1], mixed[3]], [plain[1], plain[3]])
    unguided = draw(pipeline, guidance=1.0)
    assert np.array_equal(pixels(unguided), pixels(draw(pipeline, guidance=1.0, negative_prompts="blue")))


def test_each_distinct_prompt_is_encoded_and_projected_once(pipeline, monkeypatch):
    encoded, projected = [], []
    encode, project = pipeline.text_encoder.encode, pipeline.model.project_text
    monkeypatch.setattr(pipeline.text_encoder, "encode", lambda texts: encoded.extend(texts) or encode(texts))
    monkeypatch.setattr(
        pipeline.model, "project_text", lambda *args: projected.append(len(args[0])) or project(*args)
    )
    prompts = ["a red circle"] * 3 + ["a blue square"] * 2 + ["a red circle"]
    images = draw(pipeline, prompts, seeds=[1] * 6, batch_size=2, negative_prompts="a blue square")
    assert sorted(encoded) == ["a blue square", "a red circle"]
    assert projected == [1, 1]
    assert near([images[0]], [images[5]])


def test_windows_of_prompts_change_nothing(pipeline, monkeypatch):
    want = draw(pipeline, batch_size=2)
    monkeypatch.setattr(pipeline_module, "WINDOW_IMAGES", 2)
    assert np.array_equal(pixels(want), pixels(draw(pipeline, batch_size=2)))


def test_pictures_come_as_batches_finish(pipeline):
    stream = pipeline.stream(PROMPTS, batch_size=1, progress=False)
    first = next(stream)
    assert near([first], draw(pipeline, PROMPTS[:1]))
    assert len(list(stream)) == 3


def test_decoding_in_parts_changes_nothing(pipeline, monkeypatch):
    want = draw(pipeline)
    monkeypatch.setattr(pipeline_module, "DECODE_PIXELS", 1)
    assert np.array_equal(pixels(want), pixels(draw(pipeline)))


def test_decode_is_the_codecs(pipeline):
    latents = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    images = pipeline.decode(latents, (4, 5))
    by_hand = latents.reshape(2, 4, 5, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 8, 10)
    want = pipeline.codec.decode(by_hand).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels(images), want)


def test_an_untrained_model_draws_decoded_noise(checkpoint):
    """Its velocity is zero, and 0/0 in guidance must not become a black picture."""
    untrained = load_pipeline(checkpoint, device="cpu", untrained=True)
    again = load_pipeline(checkpoint, device="cpu", untrained=True)
    for (name, a), b in zip(untrained.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    images = draw(untrained, guidance=4.0)
    assert pixels(images).std() > 20
    assert np.array_equal(pixels(images), pixels(draw(untrained, guidance=1.0)))


def test_dtype_and_devices(checkpoint):
    model = load_pipeline(checkpoint, device="cpu", dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"--device gpu: one of auto, cpu, cuda"):
        load_pipeline(checkpoint, device="gpu")
    with pytest.raises(ConfigError, match=r"--device cuda:99: torch finds \d+ CUDA devices"):
        load_pipeline(checkpoint, device="cuda:99")


def test_training_mode_and_gradients_are_left_alone(pipeline):
    """Previews are drawn in the middle of training: later backward passes must still work."""
    draw(pipeline, PROMPTS[:1])
    grid = (4, 5)
    text = pipeline.project(pipeline.text_encoder.encode(["a red circle"]), grid)
    x = torch.randn(1, 20, 64)
    pipeline.model(x, torch.tensor([0.5]), text, grid).square().mean().backward()
    gradients = [p.grad for p in pipeline.model.parameters() if p.grad is not None]
    assert sum(g.abs().sum() for g in gradients) > 0
    pipeline.model.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 33}, r"--height 33: must be a multiple of 8 px .*nearest: 32 or 40"),
        ({"width": 7}, r"--width 7: must be a multiple of 8 px .*nearest: 8"),
        ({"height": 0}, r"--height 0: must be at least 1 px"),
        ({"steps": 0}, "--steps 0"),
        ({"guidance": float("inf")}, "--guidance inf"),
        ({"shift": -1.0}, "--shift -1.0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seeds": [1, 2]}, "2 seeds for 4 prompts"),
        ({"seeds": [1 << 63, 0, 0, 0]}, "--seed 9223372036854775808: must be a 64-bit number"),
        ({"negative_prompts": ["a"]}, "1 negative prompts for 4 prompts"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(pipeline, options, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.stream(PROMPTS, **options)  # not even started


def test_no_prompts(pipeline):
    with pytest.raises(ConfigError, match="at least one prompt"):
        pipeline.generate([])
    with pytest.raises(ConfigError, match="expected a list"):
        pipeline.generate("a red circle")


def test_too_long_a_prompt_is_named(pipeline):
    prompts = [*PROMPTS, "word " * 300, "more " * 300]
    with pytest.raises(ConfigError, match=r"prompt 4 \(counting from 0\): .*300 tokens .*limit of 128"):
        draw(pipeline, prompts, batch_size=2)
    with pytest.raises(ConfigError, match=r"negative prompt 1 \(counting from 0\): .*300 tokens"):
        draw(pipeline, negative_prompts=["", "word " * 300, "", ""])


def test_encoders_that_do_not_fit_the_model(tiny_model):
    encoders = EncoderConfig()
    codec, text = build_codec(encoders.codec_spec()), build_text_encoder(encoders.text_spec())
    other = build_codec(EncoderConfig(dct_coefficients=(4, 2, 2)).codec_spec())
    with pytest.raises(ConfigError, match="gives 8 latent channels, the model reads 16"):
        Pipeline(tiny_model, other, text, SamplerConfig())
    narrow = build_text_encoder({"name": "ngram", "slices": [[0, 0, 32, False]]})
    with pytest.raises(ConfigError, match="has width 32, the model reads 256"):
        Pipeline(tiny_model, codec, narrow, SamplerConfig())
    sizeless = Pipeline(tiny_model, codec, text, SamplerConfig())
    with pytest.raises(ConfigError, match="--height: no default size is known"):
        sizeless.generate(["a red circle"])
    with pytest.raises(ConfigError, match="--width: no default size is known"):
        sizeless.generate(["a red circle"], height=32)


def test_checkpoint_without_encoders_says_which_flag_to_give(tiny_model, write, tmp_path):
    bare = write(tmp_path / "bare", tiny_model, codec=None, text_encoder=None, sampling={})
    with pytest.raises(ConfigError, match=r"does not name the codec .*give --codec-path"):
        load_pipeline(bare, device="cpu")
    half = write(tmp_path / "half", tiny_model, text_encoder=None)
    with pytest.raises(ConfigError, match=r"does not name the text encoder .*give --text-encoder-path"):
        load_pipeline(half, device="cpu")
    with pytest.raises(ConfigError, match=r"encoders.text_encoder_path .*/nowhere/at/all is no folder"):
        load_pipeline(half, device="cpu", text_encoder_path="/nowhere/at/all")


def test_a_path_for_an_encoder_that_has_none(checkpoint):
    with pytest.raises(ConfigError, match=r"--codec-path /x: the checkpoint uses the built-in codec 'dct'"):
        load_pipeline(checkpoint, device="cpu", codec_path="/x")


def test_missing_settings_are_the_released_models(tiny_model, write, tmp_path):
    folder = write(tmp_path / "step", tiny_model, sampling={"steps": 9})
    sampling = load_pipeline(folder, device="cpu").sampling
    assert sampling == SamplerConfig(steps=9, guidance=4.0, shift=1.0, height=1024, width=1024)


@pytest.mark.parametrize("sampling", [{"steps": 0}, {"guidance": "much"}, {"height": -1}])
def test_damaged_settings_are_a_damaged_checkpoint(tiny_model, write, tmp_path, sampling):
    folder = write(tmp_path / "step", tiny_model, sampling=sampling)
    with pytest.raises(DataError, match=r"step: its sampling settings are damaged"):
        load_pipeline(folder, device="cpu")


def test_damaged_and_missing_checkpoints(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_pipeline(tmp_path / "nowhere", device="cpu")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_pipeline(broken, device="cpu")


def test_other_architecture_in_the_description_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    state = json.loads((folder / "state.json").read_text())
    state["model"]["num_experts"] += 1
    (folder / "state.json").write_text(json.dumps(state))
    native.write_manifest(folder, native.describe_files(folder))
    with pytest.raises(DataError, match="shape"):
        load_pipeline(folder, device="cpu")


def test_settings_override_one_by_one(pipeline):
    got = pipeline.settings(steps=11, height=None)
    assert got == dataclasses.replace(pipeline.sampling, steps=11)
