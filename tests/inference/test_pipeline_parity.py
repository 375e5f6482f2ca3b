"""The whole pipeline against diffusers' `NucleusMoEImagePipeline`: the same folder, noise and prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_nucleus.core.patches import pack
from megatron_nucleus.export.convert import convert
from megatron_nucleus.export.load import load_model
from megatron_nucleus.inference.pipeline import load_pipeline
from megatron_nucleus.inference.sampler import sample_latents
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils import rng

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT_DIM = 32


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a red circle left of a blue square"], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_text_model():
    text = {
        "vocab_size": 512, "hidden_size": TEXT_DIM, "intermediate_size": 48, "num_hidden_layers": 9,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_DIM,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25)
    return model


def tiny_transformer():
    """Random everywhere, also the experts that upstream leaves uninitialised."""
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=4, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6), mlp_ratio=4.0,
        dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=32,
        capacity_factors=[0.0, 2.0, 2.0, 1.0], route_scale=2.5,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if p.ndim == 1 else 0.7 / p.shape[1] ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if p.ndim == 1 and "norm" in name:
                p.add_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers pipeline folder as it is published, with random weights."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    diffusers.AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1).save_pretrained(root / "vae")
    tiny_transformer().save_pretrained(root / "transformer")
    tiny_text_model().save_pretrained(root / "text_encoder")
    tiny_tokenizer().save_pretrained(root / "processor")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "NucleusMoEImagePipeline"}))
    return root


def open_upstream(folder, transformer=None):
    transformer = transformer or folder / "transformer"
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=diffusers.NucleusMoEImageTransformer2DModel.from_pretrained(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder"
        ).eval(),
        processor=transformers.AutoTokenizer.from_pretrained(folder / "processor"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def upstream(folder):
    return open_upstream(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return load_pipeline(folder, device="cpu")


def features(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(len(lengths), max(lengths), TEXT_DIM, generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return text, mask


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = {
    # lengths of positive and negative texts, guidance, grid, steps
    "square": ([6, 6], [4, 4], 4.0, (4, 4), 4),
    "uneven_texts": ([9, 3], [1, 5], 4.0, (4, 4), 3),
    "not_square": ([5], [2], 8.0, (3, 5), 5),
    "wide_odd": ([4, 2, 3], [3, 3, 3], 1.5, (1, 7), 3),
    "no_guidance": ([7, 2], [1, 1], 1.0, (4, 6), 4),
    "one_step": ([3, 3], [2, 1], 4.0, (2, 2), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_latents_equal_the_pipelines(name, folder, upstream, ours):
    lengths, negative_lengths, guidance, grid, steps = CASES[name]
    text, mask = features(lengths, 1)
    negative, negative_mask = features(negative_lengths, 2)
    noise = torch.randn(len(lengths), grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(3))
    want = upstream(
        prompt_embeds=text, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask, latents=noise.clone(), guidance_scale=guidance,
        height=16 * grid[0], width=16 * grid[1], num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip
    got = sample_latents(
        ours.model, noise, ours.project(TextFeatures(text, mask), grid),
        ours.project(TextFeatures(negative, negative_mask), grid), grid, steps, guidance,
    )  # fmt: skip
    assert relative(got, want) < 1e-4
    assert relative(got, noise) > 0.05  # something happened


def test_prompts_to_pictures_equal_the_pipelines(upstream, ours):
    """Template, tokenizer, text encoder, noise, sampler, latent statistics and VAE together."""
    prompts = ["a red circle", "a blue square left of a red circle", "a red circle"]
    height, width, seeds = 64, 48, [11, 12, 13]
    got = ours.generate(
        prompts, negative_prompts="blurred", height=height, width=width, steps=3, guidance=4.0, seeds=seeds,
        batch_size=2, progress=False,
    )  # fmt: skip
    noise = torch.cat(
        [rng.normal_batch(s, [0], "sample-noise", (16, height // 8, width // 8)) for s in seeds]
    )
    want = upstream(
        prompt=prompts, negative_prompt=["blurred"] * 3, latents=pack(noise, 2)[0], guidance_scale=4.0,
        height=height, width=width, num_inference_steps=3, output_type="np",
    ).images  # fmt: skip
    for ours_image, theirs in zip(got, want, strict=True):
        assert ours_image.size == (width, height)
        difference = np.abs(np.asarray(ours_image, np.float32) - theirs * 255.0)
        assert difference.max() <= 1.0
    spread = np.asarray(got[0], np.float32).std()
    assert spread > 5.0  # not a blank picture
    assert np.abs(np.asarray(got[0], np.float32) - np.asarray(got[2], np.float32)).max() > 5.0


def test_published_defaults_are_read_from_the_folder(ours):
    s = ours.sampling
    assert (s.steps, s.guidance, s.shift, s.height, s.width) == (50, 4.0, 1.0, 1024, 1024)
    assert ours.size_unit_px == 16


def test_exported_folder_draws_the_same_in_diffusers(folder, ours, tmp_path):
    """diffusers -> native -> diffusers: the exported folder in their pipeline, the native one in ours."""
    convert(folder, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "exported", "hf")
    text, mask = features([5, 3], 5)
    negative, negative_mask = features([2, 2], 6)
    grid = (3, 4)
    noise = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(7))
    want = open_upstream(folder, tmp_path / "exported")(
        prompt_embeds=text, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask, latents=noise.clone(), guidance_scale=4.0,
        height=48, width=64, num_inference_steps=3, output_type="latent",
    ).images  # fmt: skip
    model = load_model(tmp_path / "native")
    with torch.no_grad():
        positive = model.project_text(text, mask, grid)
        against = model.project_text(negative, negative_mask, grid)
    assert relative(sample_latents(model, noise, positive, against, grid, 3, 4.0), want) < 1e-4


def test_bf16_encoders_follow_the_model(folder):
    pipeline = load_pipeline(folder, device="cpu", dtype=torch.bfloat16)
    assert pipeline.codec.spec()["dtype"] == pipeline.text_encoder.spec()["dtype"] == "bfloat16"
    picture = pipeline.generate(["a red circle"], height=32, width=32, steps=2, progress=False)[0]
    exact = load_pipeline(folder, device="cpu").generate(
        ["a red circle"], height=32, width=32, steps=2, progress=False
    )[0]
    difference = np.asarray(picture, np.float32) - np.asarray(exact, np.float32)
    assert np.abs(difference).mean() < 4.0
