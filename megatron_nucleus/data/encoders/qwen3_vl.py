"""`Qwen3VLTextEncoder`: the published model's text features, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_nucleus.data.encoders.model_folder import (
    dtype_named,
    first_line,
    import_library,
    locate,
    model_folder,
    read_json,
    weight_files,
)
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.errors import ConfigError, DataError

# Verbatim from diffusers, pipelines/nucleusmoe_image/pipeline_nucleusmoe_image.py (DEFAULT_SYSTEM_PROMPT).
SYSTEM_PROMPT = (
    "You are an image generation assistant. Follow the user's prompt literally. Pay careful attention to "
    "spatial layout: objects described as on the left must appear on the left, on the right on the right. "
    "Match exact object counts and assign colors to the correct objects."
)
PAD_TOKENS = 8  # the pipeline pads to a multiple of 8
_ALLOW = ("text_encoder/*", "processor/*", "tokenizer/*", "*.json", "*.jinja", "*.txt", "*.safetensors")
_IGNORE = ("transformer/*", "vae/*", "unet/*")
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


class Qwen3VLTextEncoder:
    """Qwen3-VL as the published model uses it: text only, features = ``hidden_states[-8]`` of the full model.

    ``hidden_states`` has one entry more than there are layers, so index -8 is the output of layer n - 7 of n,
    before any norm: 29 of 36 layers are read and run; the vision tower, the last seven layers and the LM head
    are not. Every text, the empty one too, goes through the chat template with `SYSTEM_PROMPT`; texts are
    padded to a multiple of 8 tokens, and the mask is dropped when nothing is padded (diffusers,
    ``encode_prompt``).

    Args:
        path: folder of the model or of a diffusers pipeline (``text_encoder/`` with ``processor/`` or
            ``tokenizer/``), or a hub id ``owner/name[@revision]``.
        max_tokens: limit of the whole templated text.
        dtype: float32, bfloat16 or float16, of the network and of the features.
        hidden_state: index into ``hidden_states`` of the full model, from -n to -2.

    Raises:
        ConfigError: no path, no such folder or hub id, or transformers is not installed.
        DataError: the folder lacks a file, holds another model, or its weights are damaged.
    """

    name = "qwen3_vl"

    def __init__(
        self,
        path: str | None,
        max_tokens: int = 1024,
        dtype: str = "float32",
        hidden_state: int = -8,
        device: str | torch.device = "cpu",
    ):
        if max_tokens < 1:
            raise ConfigError(f"encoders.max_text_tokens: must be at least 1, got {max_tokens}")
        root = locate(path, "text_encoder_path", _ALLOW, _IGNORE)
        folder = model_folder(root, "text_encoder", "model_type", "qwen3_vl")
        self.path, self.max_tokens, self.dtype, self.hidden_state = str(path), max_tokens, dtype, hidden_state
        self.device = torch.device(device)
        self.truncated = 0
        transformers = import_library("transformers", "encoders.text_encoder = qwen3_vl")
        self._tokenizer = _load_tokenizer(transformers, root)
        self._model = _load_layers(transformers, folder, hidden_state, dtype_named(dtype), self.device)
        self.dim = int(self._model.config.hidden_size)

    def format(self, text: str) -> str:
        """The text inside the chat template, ready for the tokenizer."""
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], truncate: bool = False) -> TextFeatures:
        """Features [B, L, dim] in the network's dtype; L a multiple of 8; mask None when nothing is padded.

        Args:
            truncate: cut longer texts to ``max_tokens``, as upstream does, and count them in ``truncated``
                (training captions); otherwise they are errors (prompts).

        Raises:
            ConfigError: a text longer than ``max_tokens``, naming its length and the limit.
        """
        ids = self._tokenizer([self.format(t) for t in texts], return_attention_mask=False)["input_ids"]
        for i, text in enumerate(texts):
            if len(ids[i]) <= self.max_tokens:
                continue
            if not truncate:
                raise ConfigError(
                    f"a prompt of {len(ids[i])} tokens (chat template included) is longer than the limit of "
                    f"{self.max_tokens}: {text[:60]!r}...; shorten it or raise encoders.max_text_tokens "
                    "(--max-text-tokens)"
                )
            ids[i] = ids[i][: self.max_tokens]
            self.truncated += 1
        # The encoder is causal: with the padding at the end, real tokens do not depend on it.
        longest = -(-max(map(len, ids)) // PAD_TOKENS) * PAD_TOKENS
        ids_BL = torch.full((len(ids), longest), self._tokenizer.pad_token_id)
        mask_BL = torch.zeros(len(ids), longest, dtype=torch.bool)
        for i, row in enumerate(ids):
            ids_BL[i, : len(row)] = torch.tensor(row)
            mask_BL[i, : len(row)] = True
        padded = not bool(mask_BL.all())
        mask_BL = mask_BL.to(self.device)
        features_BLU = self._model(
            input_ids=ids_BL.to(self.device), attention_mask=mask_BL.long(), use_cache=False
        ).last_hidden_state
        return TextFeatures(features_BLU, mask_BL if padded else None)

    def spec(self) -> dict:
        """JSON description that rebuilds this encoder where ``path`` can be read."""
        return {
            "name": self.name,
            "dim": self.dim,
            "path": self.path,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            "hidden_state": self.hidden_state,
        }


def _load_layers(
    transformers: Any, folder: Path, hidden_state: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The text model up to the layer whose output is ``hidden_states[hidden_state]``, without its norm."""
    config = transformers.Qwen3VLConfig.from_pretrained(folder).text_config
    layers = config.num_hidden_layers + 1 + hidden_state
    if hidden_state > -2 or layers < 1:
        raise ConfigError(
            f"text encoder {folder} has {config.num_hidden_layers} layers: hidden_state {hidden_state} must "
            f"lie between {-config.num_hidden_layers} and -2"
        )
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:layers]
    with torch.device("meta"):
        model = transformers.Qwen3VLTextModel(config)
    model.norm = nn.Identity()  # hidden_states hold what enters the next layer, not the normalised output
    weights = _read_weights(folder, list(model.state_dict()), dtype, device)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise DataError(f"{folder}: the weights do not fit config.json ({first_line(error)})") from error
    # The rotary tables are no tensors of the checkpoint: built on meta, they hold nothing yet.
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    return model.eval().requires_grad_(False)


def _read_weights(
    folder: Path, names: list[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read only the named tensors of the text model, whatever prefix the checkpoint keeps them under."""
    file_of = weight_files(folder, "model")
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in file_of), None)
    if prefix is None:
        raise DataError(f"{folder}: the weights hold no embed_tokens.weight; is this a Qwen3-VL checkpoint?")
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if prefix + name not in file_of:
            raise DataError(f"{folder}: the weights lack {prefix + name}; copy the folder again")
        by_file.setdefault(file_of[prefix + name], []).append(name)
    weights = {}
    for path, wanted in by_file.items():
        try:
            with safe_open(path, "pt") as file:
                for name in wanted:
                    weights[name] = file.get_tensor(prefix + name).to(device, dtype)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: damaged ({first_line(error)}); copy it again") from error
    return weights


def _load_tokenizer(transformers: Any, root: Path) -> Any:
    """The tokenizer with its chat template, from processor/, tokenizer/ or the model's own folder."""
    folders = [parent / sub for parent in (root, root.parent) for sub in ("processor", "tokenizer")]
    folders.insert(2, root)
    folder = next(
        (f for f in folders if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()), None
    )
    if folder is None:
        raise DataError(
            f"{root}: no tokenizer.json (or vocab.json and merges.txt) in processor/, tokenizer/ or the "
            "folder itself; copy the model's tokenizer files there"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise DataError(
            f"{folder}: cannot load the tokenizer ({first_line(error)}); copy it again"
        ) from error
    stored = folder / "chat_template.json"  # where processors kept it before chat_template.jinja
    if not tokenizer.chat_template and stored.is_file():
        tokenizer.chat_template = read_json(stored).get("chat_template")
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: no chat template; copy the model's chat_template.jinja there")
    if tokenizer.pad_token_id is None:
        raise DataError(f"{folder / 'tokenizer_config.json'}: no pad_token; copy the model's file")
    return tokenizer
