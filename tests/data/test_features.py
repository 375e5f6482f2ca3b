"""`FeatureExtractor`: stored features and features made online give the same batch."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.core.patches import unpack
from megatron_nucleus.data.encoders.dct import DctCodec
from megatron_nucleus.data.encoders.ngram import NgramTextEncoder
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.types import RawBatch, TextFeatures
from megatron_nucleus.utils.errors import ConfigError

TEXTS = ("a red circle", "", "two blue squares")


def raw_batch(**changes):
    pixels = torch.randint(
        0, 256, (3, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    fields = {
        "bucket": "3x2",
        "draws": (5, 6, 7),
        "ids": ("a", "b", "c"),
        "texts": TEXTS,
        "step_samples": 3,
        "pixels_BCHW": pixels,
    }
    return RawBatch(**{**fields, **changes})


def test_online_batch():
    codec, text_encoder = DctCodec(coefficients=(16, 16, 16)), NgramTextEncoder()
    raw = raw_batch()
    batch = FeatureExtractor(codec, text_encoder, patch_size=2).extract(raw)
    assert batch.grid == (2, 3)
    assert batch.latents_BSP.shape == (3, 6, 48 * 4)
    assert batch.latents_BSP.dtype == batch.text.features_BLU.dtype == torch.float32
    assert (batch.bucket, batch.draws) == ("3x2", (5, 6, 7))
    assert torch.equal(codec.decode(unpack(batch.latents_BSP, batch.grid, 2)), raw.pixels_BCHW)
    assert batch.text.mask_BL.sum(1).tolist() == [3, 1, 3]


def test_stored_features_give_the_same_batch():
    codec, text_encoder = DctCodec(), NgramTextEncoder()
    raw = raw_batch()
    online = FeatureExtractor(codec, text_encoder, patch_size=2).extract(raw)
    latents, text = codec.encode(raw.pixels_BCHW), text_encoder.encode(list(TEXTS))
    stored = raw_batch(pixels_BCHW=None, latents_BCHW=latents, text=text)
    batch = FeatureExtractor(None, None, patch_size=2).extract(stored)
    assert torch.equal(batch.latents_BSP, online.latents_BSP)
    assert torch.equal(batch.text.features_BLU, online.text.features_BLU)
    assert torch.equal(batch.text.mask_BL, online.text.mask_BL)
    half = raw_batch(
        pixels_BCHW=None,
        latents_BCHW=latents.bfloat16(),
        text=TextFeatures(text.features_BLU.bfloat16(), text.mask_BL),
    )
    batch = FeatureExtractor(None, None, patch_size=2).extract(half)
    assert batch.latents_BSP.dtype == batch.text.features_BLU.dtype == torch.float32
    torch.testing.assert_close(batch.latents_BSP, online.latents_BSP, rtol=2**-8, atol=0)


def test_long_captions_are_cut_and_counted():
    text_encoder = NgramTextEncoder(max_tokens=2)
    batch = FeatureExtractor(DctCodec(), text_encoder, patch_size=2).extract(raw_batch())
    assert batch.text.features_BLU.shape[1] == 2
    assert text_encoder.truncated == 2


def test_what_cannot_be_made_is_an_error():
    codec, text_encoder = DctCodec(), NgramTextEncoder()
    with pytest.raises(ConfigError, match="no stored latents"):
        FeatureExtractor(None, text_encoder, 2).extract(raw_batch())
    with pytest.raises(ConfigError, match="no stored latents"):
        FeatureExtractor(codec, text_encoder, 2).extract(raw_batch(pixels_BCHW=None))
    with pytest.raises(ConfigError, match="no stored text features"):
        FeatureExtractor(codec, None, 2).extract(raw_batch())
    with pytest.raises(ConfigError, match="cannot be cut into 4 x 4 patches"):
        FeatureExtractor(codec, text_encoder, 4).extract(raw_batch())
