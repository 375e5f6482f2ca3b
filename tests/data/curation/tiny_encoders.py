"""Tiny SigLIP, SigLIP 2 and CLIP models with random weights and a word tokenizer, in folders as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("a", "photo", "with", "without", "watermark", "red", "blue", "circle", "square", "cat", "two", "and")
LETTERS = "▁abcdefghijklmnopqrstuvwxyz"  # the vocabulary of the tiny SigLIP 2, whose tokenizer is a BPE
TEXT_TOKENS = 24  # longest text of the tiny models
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WEIGHT_SCALE = 4.0  # over the initial weights, which are so small that all vectors nearly agree


def make_encoder(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a model of ``siglip``, ``siglip2`` or ``clip`` for pictures of 32 px; returns the folder."""
    import torch

    torch.manual_seed(seed)
    network = _network(family)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(_WEIGHT_SCALE)
            if name == "logit_bias":
                weight.fill_(-1.5)
            if name == "logit_scale":
                weight.fill_(1.2)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(family)))
    _tokenizer(family).save_pretrained(folder)
    return folder


def _network(family: str) -> Any:
    import transformers

    text = {**_TOWER, "vocab_size": 4 + max(len(WORDS), len(LETTERS)), "max_position_embeddings": TEXT_TOKENS}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**_TOWER, "patch_size": 8}
    if family == "siglip2":
        config = transformers.Siglip2Config(
            text_config={**text, "projection_size": 16}, vision_config={**vision, "num_patches": 16}
        )
        return transformers.Siglip2Model(config)
    vision |= {"image_size": 32}
    if family == "siglip":
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)
        return transformers.SiglipModel(config)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    )


def _processor(family: str) -> dict:
    common = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "do_normalize": True,
        "do_rescale": True,
    }
    if family == "siglip2":
        return common | {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": 8,
            "max_num_patches": 16,
        }
    if family == "siglip":
        size = {"size": {"height": 32, "width": 32}, "resample": 3}
        return common | size | {"image_processor_type": "SiglipImageProcessor"}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    return common | size | {"image_processor_type": "CLIPImageProcessor", "resample": 3}


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Siglip2Tokenizer

    specials = ("<pad>", "<unk>", "<bos>", "<eos>")
    if family == "siglip2":
        return Siglip2Tokenizer(
            vocab={letter: i for i, letter in enumerate((*specials, *LETTERS))}, merges=[]
        )
    vocabulary = {word: i for i, word in enumerate((*specials, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<bos> $A <eos>" if family == "clip" else "$A <eos>"
    tokenizer.post_processor = processors.TemplateProcessing(
        template, special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
