"""The published encoders against diffusers and transformers, with tiny random weights made on the spot."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nucleus.data.encoders import EncoderConfig, build_codec, build_text_encoder
from megatron_nucleus.utils.errors import ConfigError, DataError

PROMPTS = ["a red circle left of a blue square", "", "three circles, two of them blue and one of them red"]
# Qwen's chat format for text, both spellings of the content.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer():
    """A byte-level BPE trained here, in Qwen's class."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(PROMPTS, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_text_model(layers: int):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25)
    return model


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A diffusers pipeline folder with text_encoder/ (10 layers), processor/ and vae/."""
    from diffusers import AutoencoderKLQwenImage

    root = tmp_path_factory.mktemp("pipeline")
    make_text_model(10).save_pretrained(root / "text_encoder", max_shard_size="60KB")
    make_tokenizer().save_pretrained(root / "processor")
    torch.manual_seed(1)
    AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1).save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def upstream(pipeline_folder):
    """diffusers' own pipeline on the same weights; only its text and VAE parts are used."""
    from diffusers import AutoencoderKLQwenImage, NucleusMoEImagePipeline
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    return NucleusMoEImagePipeline(
        transformer=None,
        scheduler=None,
        vae=AutoencoderKLQwenImage.from_pretrained(pipeline_folder / "vae"),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(pipeline_folder / "text_encoder").eval(),
        processor=AutoTokenizer.from_pretrained(pipeline_folder / "processor"),
    )


@pytest.fixture(scope="module")
def text_encoder(pipeline_folder):
    config = EncoderConfig(text_encoder="qwen3_vl", text_encoder_path=str(pipeline_folder))
    return build_text_encoder(config.text_spec())


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [""], ["a red circle"] * 2])
def test_text_features_equal_the_pipelines(text_encoder, upstream, prompts):
    with torch.no_grad():
        features, mask = upstream.encode_prompt(prompts, device="cpu", max_sequence_length=1024)
    ours = text_encoder.encode(prompts)
    assert (ours.mask_BL is None) == (mask is None)
    assert ours.features_BLU.shape == features.shape
    assert ours.features_BLU.shape[1] % 8 == 0
    real = slice(None) if mask is None else mask.bool()
    if mask is not None:
        assert torch.equal(ours.mask_BL, mask.bool())
    torch.testing.assert_close(ours.features_BLU[real], features[real], rtol=0, atol=0)


def test_only_the_needed_layers_are_loaded(text_encoder):
    # hidden_states[-8] of 10 layers is the output of layer 3
    assert len(text_encoder._model.layers) == 3
    kept = sum(p.numel() for p in text_encoder._model.parameters())
    assert kept < sum(p.numel() for p in make_text_model(10).parameters()) / 2
    assert not any(p.requires_grad for p in text_encoder._model.parameters())
    assert text_encoder.dim == 32


def test_every_hidden_state_index_matches_the_full_model(pipeline_folder, upstream):
    for index in (-2, -10):
        ours = build_text_encoder({"name": "qwen3_vl", "path": str(pipeline_folder), "hidden_state": index})
        with torch.no_grad():
            features, _ = upstream.encode_prompt(PROMPTS[0], device="cpu", return_index=index)
        torch.testing.assert_close(ours.encode(PROMPTS[:1]).features_BLU, features, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="between -10 and -2"):
        build_text_encoder({"name": "qwen3_vl", "path": str(pipeline_folder), "hidden_state": -11})


def test_features_do_not_depend_on_the_batch(text_encoder):
    together, mask_BL = text_encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, alone_mask = text_encoder.encode([prompt])
        n = int(mask_BL[i].sum())
        assert (int(alone_mask.sum()) if alone_mask is not None else alone.shape[1]) == n
        torch.testing.assert_close(together[i, :n], alone[0, :n], rtol=1e-4, atol=1e-5)


def test_the_template_wraps_every_text(text_encoder):
    text = text_encoder.format("")
    assert text.startswith("<|im_start|>system\nYou are an image generation assistant. Follow")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_too_long_a_prompt_is_an_error_and_a_caption_is_cut_and_counted(pipeline_folder, upstream):
    encoder = build_text_encoder({"name": "qwen3_vl", "path": str(pipeline_folder)})
    length, template = (
        len(encoder._tokenizer(encoder.format(t))["input_ids"]) for t in ("circle " * 200, "")
    )
    limit = (template // 8 + 1) * 8  # upstream takes multiples of 8 alone
    encoder = build_text_encoder({**encoder.spec(), "max_tokens": limit})
    with pytest.raises(ConfigError, match=f"{length} tokens .* limit of {limit}"):
        encoder.encode(["circle " * 200])
    features, mask = encoder.encode(["circle " * 200, ""], truncate=True)
    assert encoder.truncated == 1
    with torch.no_grad():
        reference, reference_mask = upstream.encode_prompt(
            ["circle " * 200, ""], device="cpu", max_sequence_length=limit
        )
    assert torch.equal(mask, reference_mask.bool())
    torch.testing.assert_close(features[mask], reference[mask], rtol=0, atol=0)


def test_text_spec_rebuilds_the_encoder_in_bfloat16(pipeline_folder, text_encoder):
    spec = {**text_encoder.spec(), "dtype": "bfloat16"}
    half = build_text_encoder(json.loads(json.dumps(spec)))
    assert half.spec() == spec
    features = half.encode(PROMPTS[:1]).features_BLU
    assert features.dtype == torch.bfloat16
    full = text_encoder.encode(PROMPTS[:1]).features_BLU
    error = (features.float() - full).norm() / full.norm()
    assert 0 < error < 0.05


def test_model_and_tokenizer_in_one_folder(pipeline_folder, text_encoder, tmp_path):
    shutil.copytree(pipeline_folder / "text_encoder", tmp_path / "model")
    shutil.copytree(pipeline_folder / "processor", tmp_path / "model", dirs_exist_ok=True)
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    same = build_text_encoder({"name": "qwen3_vl", "path": str(tmp_path / "model")})
    assert torch.equal(same.encode(PROMPTS)[0], text_encoder.encode(PROMPTS)[0])


def test_codec_matches_the_pipelines_latents(pipeline_folder, upstream):
    config = EncoderConfig(latent_codec="qwen_image_vae", codec_path=str(pipeline_folder))
    codec = build_codec(config.codec_spec())
    vae = upstream.vae
    assert (codec.channels, codec.stride_px) == (16, 8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)
    latents = codec.encode(pixels)
    # what the pipeline does before vae.decode, undone by hand
    with torch.no_grad():
        mode = vae.encode((pixels.float() / 127.5 - 1)[:, :, None]).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents[:, :, None], (mode - mean) / std, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        image = vae.decode(latents[:, :, None] / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
    expected = upstream.image_processor.postprocess(image, output_type="np")
    expected = torch.from_numpy((expected * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    difference = (codec.decode(latents).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3  # only where rounding is a tie
    assert latents.dtype == torch.float32


def test_codec_spec_and_tiling(pipeline_folder):
    spec = {
        "name": "qwen_image_vae",
        "path": str(pipeline_folder / "vae"),
        "tiling": True,
        "dtype": "float32",
    }
    tiled = build_codec(spec)
    assert tiled.spec() == spec
    whole = build_codec({**spec, "tiling": False})
    pixels = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    assert torch.equal(tiled.encode(pixels), whole.encode(pixels))  # one tile holds it
    large = torch.randint(0, 256, (1, 3, 264, 8), dtype=torch.uint8)
    assert tiled.encode(large).shape == whole.encode(large).shape
    assert not torch.equal(tiled.encode(large), whole.encode(large))
    with pytest.raises(ConfigError, match="30 x 32 px"):
        whole.encode(pixels[:, :, :30])


def broken(folder, tmp_path, name):
    return shutil.copytree(folder, tmp_path / name)


def test_bad_folders(pipeline_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"codec_path \(--codec-path\) is required"):
        build_codec(EncoderConfig(latent_codec="qwen_image_vae").codec_spec())
    with pytest.raises(ConfigError, match=r"text_encoder_path.*/no/such/folder is no folder"):
        build_text_encoder({"name": "qwen3_vl", "path": "/no/such/folder"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty/config.json: no such file"):
        build_codec({"name": "qwen_image_vae", "path": str(tmp_path / "empty")})
    with pytest.raises(DataError, match="expected 'qwen3_vl'"):
        build_text_encoder({"name": "qwen3_vl", "path": str(pipeline_folder / "vae")})
    with pytest.raises(ConfigError, match=r"encoder_dtype: 'bf16' is unknown"):
        build_codec({"name": "qwen_image_vae", "path": str(pipeline_folder), "dtype": "bf16"})

    folder = broken(pipeline_folder, tmp_path, "no_tokenizer")
    shutil.rmtree(folder / "processor")
    with pytest.raises(DataError, match=r"no tokenizer.json"):
        build_text_encoder({"name": "qwen3_vl", "path": str(folder)})
    folder = broken(pipeline_folder, tmp_path, "no_template")
    (folder / "processor" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        build_text_encoder({"name": "qwen3_vl", "path": str(folder)})
    folder = broken(pipeline_folder, tmp_path, "broken_tokenizer")
    (folder / "processor" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        build_text_encoder({"name": "qwen3_vl", "path": str(folder)})


def test_damaged_weights_are_named(pipeline_folder, tmp_path):
    folder = broken(pipeline_folder, tmp_path, "shard_gone")
    shard = sorted((folder / "text_encoder").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: no such file, though"):
        build_text_encoder({"name": "qwen3_vl", "path": str(folder)})

    folder = broken(pipeline_folder, tmp_path, "shard_cut")
    shard = sorted((folder / "text_encoder").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{shard.name}: damaged"):
        build_text_encoder({"name": "qwen3_vl", "path": str(folder)})

    folder = broken(pipeline_folder, tmp_path, "vae_cut")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"diffusion_pytorch_model\.safetensors: damaged"):
        build_codec({"name": "qwen_image_vae", "path": str(folder)})
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(DataError, match=f"lack {name}"):
        build_codec({"name": "qwen_image_vae", "path": str(folder)})
    weights.unlink()
    with pytest.raises(DataError, match="only safetensors weights are read"):
        build_codec({"name": "qwen_image_vae", "path": str(folder)})


def test_a_hub_id_is_fetched_without_the_transformer(pipeline_folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(repo, revision=None, allow_patterns=None, ignore_patterns=None):
        asked.update(repo=repo, revision=revision, ignore=ignore_patterns)
        return str(pipeline_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    codec = build_codec({"name": "qwen_image_vae", "path": "owner/name@abc123"})
    assert asked["repo"] == "owner/name"
    assert asked["revision"] == "abc123"
    assert "transformer/*" in asked["ignore"]
    assert codec.spec()["path"] == "owner/name@abc123"

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"neither a folder here nor a hub id .*no connection"):
        build_codec({"name": "qwen_image_vae", "path": "owner/name"})
