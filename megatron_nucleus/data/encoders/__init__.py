"""Encoders behind two protocols: pixels <-> latents, and text -> features. Both are frozen.

A *spec* is a JSON dictionary that rebuilds the same encoder; checkpoints and encoded folders carry it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_nucleus.data.encoders.dct import DCT_STATISTICS, DctCodec
from megatron_nucleus.data.encoders.ngram import NGRAM_SLICES, NgramTextEncoder
from megatron_nucleus.data.encoders.qwen3_vl import Qwen3VLTextEncoder
from megatron_nucleus.data.encoders.qwen_image_vae import QwenImageVae
from megatron_nucleus.types import TextFeatures
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest

CODECS = {c.name: c for c in (DctCodec, QwenImageVae)}
TEXT_ENCODERS = {c.name: c for c in (NgramTextEncoder, Qwen3VLTextEncoder)}
NGRAM_MAX_TOKENS = 128
QWEN_MAX_TOKENS = 1024  # the published pipeline's default_max_sequence_length
# Entries of a spec that say where an encoder lies and how it is run, not which one it is.
RUNTIME_KEYS = ("path", "tiling", "dtype")


class LatentCodec(Protocol):
    """Frozen map between pixels and normalised latents.

    channels: latent channels. stride_px: pixels per latent row and column.
    """

    name: str
    channels: int
    stride_px: int

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> latents fp32 [B, channels, H/stride, W/stride], about unit variance."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents -> uint8 RGB [B, 3, H, W]; values outside the displayable range are clipped to 0..255."""
        ...

    def spec(self) -> dict:
        """JSON description that rebuilds this codec."""
        ...


class TextEncoder(Protocol):
    """Frozen text features.

    dim: U, width of a feature. max_tokens: longest text. truncated: texts cut so far by ``truncate=True``.
    """

    name: str
    dim: int
    max_tokens: int
    truncated: int

    def encode(self, texts: Sequence[str], truncate: bool = False) -> TextFeatures:
        """[B, L, dim], padded at the end to the batch's longest text; mask None when nothing is padded.

        Args:
            truncate: cut texts that are too long and count them; otherwise they raise ConfigError.
        """
        ...

    def spec(self) -> dict:
        """JSON description that rebuilds this encoder."""
        ...


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Frozen encoders: what turns pixels into latents and captions into text features."""

    latent_codec: str = knob("dct", "pixels <-> latents", choices=tuple(CODECS))
    codec_path: str | None = knob(None, "folder or hub id of the VAE, or of a diffusers pipeline")
    codec_tiling: bool = knob(False, "VAE: work in overlapping tiles to save memory on large images")
    dct_coefficients: tuple[int, ...] = knob(
        (8, 4, 4), "kept coefficients of luma and two chroma planes of a 4 x 4 block; 16 16 16 is lossless"
    )
    dct_statistics: str = knob(
        "scenes", "measured mean and std that normalise the dct latents", choices=tuple(DCT_STATISTICS)
    )
    text_encoder: str = knob("ngram", "captions -> text features", choices=tuple(TEXT_ENCODERS))
    text_encoder_path: str | None = knob(None, "folder or hub id of Qwen3-VL, or of a diffusers pipeline")
    max_text_tokens: int | None = knob(
        None,
        f"longest prompt; captions are cut to it and counted; None = {NGRAM_MAX_TOKENS} for ngram, "
        f"{QWEN_MAX_TOKENS} for qwen3_vl",
        unit="tokens",
    )
    encoder_dtype: str = knob(
        "float32", "precision of the VAE and of Qwen3-VL", choices=("float32", "bfloat16", "float16")
    )

    def codec_spec(self) -> dict:
        """Spec of the configured codec (see `build_codec`)."""
        if self.latent_codec == "dct":
            return DctCodec(coefficients=self.dct_coefficients, statistics=self.dct_statistics).spec()
        return {
            "name": self.latent_codec,
            "path": self.codec_path,
            "tiling": self.codec_tiling,
            "dtype": self.encoder_dtype,
        }

    def text_spec(self) -> dict:
        """Spec of the configured text encoder (see `build_text_encoder`)."""
        if self.text_encoder == "ngram":
            return NgramTextEncoder(NGRAM_SLICES, max_tokens=self._max_tokens(NGRAM_MAX_TOKENS)).spec()
        return {
            "name": self.text_encoder,
            "path": self.text_encoder_path,
            "max_tokens": self._max_tokens(QWEN_MAX_TOKENS),
            "dtype": self.encoder_dtype,
        }

    def _max_tokens(self, default: int) -> int:
        return default if self.max_text_tokens is None else self.max_text_tokens


def build_codec(spec: dict, device: str | torch.device = "cpu") -> LatentCodec:
    """Build a codec from its spec.

    Raises:
        ConfigError: unknown name or field, or a model folder that is not given or does not exist.
        DataError: the folder lacks a file or holds a damaged one.
    """
    return _build(spec, "latent_codec", CODECS, device)


def build_text_encoder(spec: dict, device: str | torch.device = "cpu") -> TextEncoder:
    """Build a text encoder from its spec; errors as in `build_codec`."""
    return _build(spec, "text_encoder", TEXT_ENCODERS, device)


def same_encoder(a: dict | None, b: dict | None) -> bool:
    """Whether two specs name the same encoder, wherever it lies and however it is run (`RUNTIME_KEYS`).

    Where only one of them has an entry, the other leaves it open (a configured path says nothing of the width).
    """
    if a is None or b is None:
        return a is b
    keys = (a.keys() & b.keys()).difference(RUNTIME_KEYS)
    return "name" in keys and all(a[key] == b[key] for key in keys)


def _build(spec: dict, option: str, classes: dict[str, type], device: str | torch.device) -> Any:
    name = spec.get("name") if isinstance(spec, dict) else spec
    if name not in classes:
        raise ConfigError(
            f"encoders.{option}: '{name}' is unknown{nearest(str(name), classes)}; "
            f"one of: {', '.join(classes)}"
        )
    arguments = {k: v for k, v in spec.items() if k not in ("name", "dim")}  # dim follows from the rest
    known = inspect.signature(classes[name]).parameters
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"encoders.{option}: spec of '{name}' has an unknown key '{key}'{nearest(key, known)}"
            )
    return classes[name](**arguments, device=device)
