"""Frozen encoders applied to a batch: pixels and captions, or stored features, become the model's input."""

from __future__ import annotations

import torch

from megatron_nucleus.core.patches import pack
from megatron_nucleus.data.encoders import LatentCodec, TextEncoder
from megatron_nucleus.types import Batch, RawBatch, TextFeatures
from megatron_nucleus.utils.errors import ConfigError


class FeatureExtractor:
    """Turns `RawBatch` into `Batch`: encodes what is not stored, then one path for both.

    Args:
        codec, text_encoder: may be None when every batch brings stored latents, or stored text features.
        patch_size: latent rows and columns per token.
        device: where the batch is put.
    """

    def __init__(
        self,
        codec: LatentCodec | None,
        text_encoder: TextEncoder | None,
        patch_size: int,
        device: str | torch.device = "cpu",
    ):
        self.codec, self.text_encoder = codec, text_encoder
        self.patch_size, self.device = patch_size, torch.device(device)

    @property
    def multiple_px(self) -> int:
        """Side of a token: image sizes are multiples of it. 1 without a codec: stored latents have their size."""
        return self.codec.stride_px * self.patch_size if self.codec else 1

    @torch.no_grad()
    def extract(self, raw: RawBatch) -> Batch:
        """Encode, pack into tokens, move to the device. Latents and text features come out in fp32.

        Captions longer than the text encoder's limit are cut and counted in its ``truncated``.

        Raises:
            ConfigError: a size that codec or patch does not divide, or features that are neither stored nor
                encodable.
        """
        latents_BCHW = raw.latents_BCHW if raw.latents_BCHW is not None else self._encode_pixels(raw)
        text = raw.text if raw.text is not None else self._encode_texts(raw)
        latents_BSP, grid = pack(
            latents_BCHW.to(self.device, torch.float32, non_blocking=True), self.patch_size
        )
        features_BLU = text.features_BLU.to(self.device, torch.float32, non_blocking=True)
        mask_BL = None if text.mask_BL is None else text.mask_BL.to(self.device, non_blocking=True)
        return Batch(raw.bucket, raw.draws, latents_BSP, TextFeatures(features_BLU, mask_BL), grid)

    def _encode_pixels(self, raw: RawBatch) -> torch.Tensor:
        if self.codec is None or raw.pixels_BCHW is None:
            raise ConfigError(
                f"bucket {raw.bucket}: no stored latents, and no codec or no pixels to make them from"
            )
        return self.codec.encode(raw.pixels_BCHW)

    def _encode_texts(self, raw: RawBatch) -> TextFeatures:
        if self.text_encoder is None:
            raise ConfigError(
                f"bucket {raw.bucket}: no stored text features, and no text encoder to make them"
            )
        return self.text_encoder.encode(raw.texts, truncate=True)
