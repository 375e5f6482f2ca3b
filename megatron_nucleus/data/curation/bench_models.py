"""Stand-ins for the models of curation, to measure what the stages around them cost.

A captioner that answers at once, and a SigLIP with random weights that looks at pictures of the usual 224 px but is so
small that it hardly computes. What they say of a picture means nothing. What remains of a stage's time is its own:
reading, decoding and shrinking pictures, tokens, the ledger, the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_nucleus.data.curation.captioners.protocol import Reply, Request

PACKAGES = ("torch", "transformers", "tokenizers")
SIDE_PX = 224  # as google/siglip-base-patch16-224
TEXT_TOKENS = 64  # as there
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class InstantCaptioner:
    """`Captioner` whose answers cost nothing, different for every length."""

    name, revision = "instant", "1"

    def __init__(self, settings: Any, ledger: Any):
        """Neither is used."""

    def caption(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """See `Captioner`."""
        for number, request in enumerate(requests):
            yield number, Reply(f"a {request.length} stand-in for a caption")


def stages(model: Path) -> list[str | dict[str, Any]]:
    """A recipe of the stages that need models, with the stand-ins, as ``recipe.stages`` takes it.

    Every image is scored against its captions and then described anew in each length: no caption passes the gate.
    model: folder of `write_siglip`.
    """
    captioner = f"{Path(__file__).resolve()}:{InstantCaptioner.__name__}"
    return [
        "inspect",
        "exact_duplicates",
        {"score": {"as": "alignment", "kind": "alignment", "model": str(model.resolve()), "device": "cpu"}},
        {"recaption": {"captioner": captioner, "keep_above": 1.0, "synthesise_below": 1.0}},
    ]


def write_siglip(folder: Path) -> Path:
    """Write the small SigLIP with its tokenizer, as transformers saves models; returns the folder.

    Its logits are cosines, so that an alignment is from 0.27 to 0.73. Needs `PACKAGES`.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = {**_TOWER, "vocab_size": 2, "max_position_embeddings": TEXT_TOKENS, "projection_size": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**_TOWER, "image_size": SIDE_PX, "patch_size": 32}
    torch.manual_seed(0)
    network = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        network.logit_scale.fill_(0.0)  # of its logarithm
        network.logit_bias.fill_(0.0)
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIDE_PX, "width": SIDE_PX},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
