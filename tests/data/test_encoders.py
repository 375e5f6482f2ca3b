"""The embedded encoders (block DCT, n-gram text), their specs and the configuration section."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_nucleus.data.encoders import EncoderConfig, build_codec, build_text_encoder
from megatron_nucleus.data.encoders.dct import DCT_STATISTICS, DctCodec, dct_basis, frequencies
from megatron_nucleus.data.encoders.ngram import FUNCTION_WORDS, NGRAM_SLICES, NgramTextEncoder
from megatron_nucleus.utils.config import from_dict
from megatron_nucleus.utils.errors import ConfigError


def random_pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def scenes(count):
    from megatron_nucleus.data.scenes import SceneConfig, draw

    pictures = [picture for _, picture in draw(SceneConfig(), 7, range(count))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def photographs(side):
    """scikit-learn's and scikit-image's colour photographs, centre-cropped to side x side."""
    from PIL import Image
    from skimage import data
    from sklearn import datasets

    out = []
    for array in [data.astronaut(), data.chelsea(), data.coffee(), *datasets.load_sample_images().images]:
        image = Image.fromarray(array)
        short = min(image.size)
        out.append(np.array(image.crop((0, 0, short, short)).resize((side, side), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def psnr_db(a, b):
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


# --- block DCT


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_the_basis_is_orthonormal(stride):
    rows = dct_basis(stride, [stride**2] * 3).flatten(1)
    torch.testing.assert_close(
        rows @ rows.T, torch.eye(3 * stride**2, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_encode_is_the_textbook_dct_of_each_block():
    pixels = random_pixels(1, 3, 8, 8)
    codec = DctCodec(coefficients=(16, 16, 16), mean=[0.0] * 48, std=[1.0] * 48)
    latents = codec.encode(pixels)
    x = pixels[0].double().numpy() / 127.5 - 1
    luma = x.sum(0) / 3**0.5
    i = np.arange(4)
    for k, (u, v) in enumerate(frequencies(4)):
        wave = np.cos(np.pi * (2 * i + 1) * u / 8)[:, None] * np.cos(np.pi * (2 * i + 1) * v / 8)[None, :]
        scale = (2 if u else 1) ** 0.5 * (2 if v else 1) ** 0.5 / 4
        expected = scale * (luma[4:8, 0:4] * wave).sum()
        assert abs(float(latents[0, k, 1, 0]) - expected) < 1e-5
    # Parseval: an orthonormal transform keeps the energy
    torch.testing.assert_close(latents.double().square().sum(), torch.tensor((x**2).sum()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("statistics", sorted(DCT_STATISTICS))
def test_all_coefficients_are_lossless(statistics):
    codec = DctCodec(coefficients=(16, 16, 16), statistics=statistics)
    pixels = random_pixels(4, 3, 20, 36)
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


def test_scene_latents_are_normalised():
    latents = DctCodec().encode(scenes(400))
    assert latents.shape == (400, 16, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 0.2  # the second harmonics' mean is not quite 0
    assert ((latents.std((0, 2, 3)) - 1).abs() < 0.15).all()


def test_a_flat_picture_needs_only_its_means():
    pixels = torch.tensor([10, 200, 77], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    codec = DctCodec(coefficients=(1, 1, 1))
    assert codec.channels == 3
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


def test_16_channels_keep_pictures_recognisable():
    # measured: 31.6 dB on scenes; 26.7, 28.8 and 30.9 dB on these five photographs
    codec = DctCodec()
    pixels = scenes(100)
    assert psnr_db(codec.decode(codec.encode(pixels)), pixels) > 31.0
    codec = DctCodec(statistics="photographs")
    for side, floor in ((32, 26.5), (64, 28.5), (128, 30.7)):
        pixels = photographs(side)
        assert psnr_db(codec.decode(codec.encode(pixels)), pixels) > floor


def test_decode_clips_to_the_displayable_range():
    codec = DctCodec()
    latents = torch.zeros(1, 16, 2, 2)
    latents[:, 0] = 50.0
    assert codec.decode(latents).unique().tolist() == [255]
    assert codec.decode(-latents).unique().tolist() == [0]


def test_fitted_statistics_normalise_the_given_images():
    pixels = photographs(32)
    codec = DctCodec.fitted(pixels, coefficients=(8, 4, 4))
    latents = codec.encode(pixels)
    assert latents.mean((0, 2, 3)).abs().max() < 0.01
    assert ((latents.std((0, 2, 3)) - 1).abs() < 0.02).all()
    again = build_codec(json.loads(json.dumps(codec.spec())))
    assert torch.equal(again.encode(pixels), latents)


def test_dct_spec_is_self_contained(monkeypatch):
    pixels = random_pixels(2, 3, 16, 16)
    spec = EncoderConfig(dct_statistics="photographs").codec_spec()
    before = build_codec(spec).encode(pixels)
    monkeypatch.setitem(DCT_STATISTICS, "photographs", DCT_STATISTICS["scenes"])
    assert torch.equal(build_codec(json.loads(json.dumps(spec))).encode(pixels), before)
    assert build_codec(spec).spec() == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DctCodec(coefficients=(8, 4)), r"dct_coefficients: \[8, 4\] must be 3 numbers"),
        (lambda: DctCodec(coefficients=(17, 4, 4)), "from 1 to stride"),
        (lambda: DctCodec(statistics="scene"), r"did you mean scenes\?"),
        (lambda: DctCodec(stride_px=8), "statistics are for stride 4"),
        (lambda: DctCodec(mean=[0.0] * 16, std=[0.0] * 16), "std above 0"),
        (
            lambda: DctCodec().encode(random_pixels(1, 3, 32, 30)),
            "32 x 30 px .* multiples of the codec's stride",
        ),
        (lambda: build_codec({"name": "dtc"}), r"'dtc' is unknown \(did you mean dct\?\)"),
        (lambda: build_codec({"name": "dct", "stride": 4}), "unknown key 'stride'"),
        (lambda: build_codec({}), "'None' is unknown"),
    ],
)
def test_bad_codecs(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- n-gram text


def slice_of(encoder, number):
    start = sum(s[2] for s in encoder.slices[:number])
    return slice(start, start + encoder.slices[number][2])


def at(encoder, text, word, number):
    """The feature slice of one word."""
    features = encoder.encode([text]).features_BLU[0]
    return features[encoder.tokens(text).index(word), slice_of(encoder, number)]


def test_the_default_width_is_the_presets():
    from megatron_nucleus.core.models.presets import PRESETS

    encoder = build_text_encoder(EncoderConfig().text_spec())
    assert encoder.dim == PRESETS["demo"].text_dim == sum(s[2] for s in NGRAM_SLICES)
    assert encoder.spec()["dim"] == encoder.dim


def test_tokens():
    tokens = NgramTextEncoder().tokens
    assert tokens("A Red circle, left-of\n2 squares!") == [
        "a",
        "red",
        "circle",
        ",",
        "left",
        "-",
        "of",
        "2",
        "squares",
        "!",
    ]
    assert tokens("the dog's ﬁne CAFÉ") == ["the", "dog's", "fine", "café"]
    assert tokens("两只cats") == ["两", "只", "cats"]
    assert tokens(" \n\t") == []


def test_a_feature_belongs_to_its_ngram_wherever_it_stands():
    encoder = NgramTextEncoder()
    a, b = "a photo of a red circle", "two blue squares and a red circle on the left"
    # slice 0: the word; slice 1: "red circle"; function words are stepped over
    for number in (0, 1):
        assert torch.equal(at(encoder, a, "circle", number), at(encoder, b, "circle", number))
    assert torch.equal(
        at(encoder, "circle to the left of a square", "circle", 2),
        at(encoder, "circle left of a square", "circle", 2),
    )
    # another colour changes the bigram, not the word
    c = "a photo of a blue circle"
    assert torch.equal(at(encoder, a, "circle", 0), at(encoder, c, "circle", 0))
    assert not torch.equal(at(encoder, a, "circle", 1), at(encoder, c, "circle", 1))
    # order matters: which one is left of the other
    d, e = "red circle left of blue square", "blue square left of red circle"
    assert not torch.equal(at(encoder, d, "left", 5), at(encoder, e, "left", 5))


def test_features_are_signs_and_content_slices_are_zero_at_function_words():
    encoder = NgramTextEncoder()
    features = encoder.encode(["a red circle"]).features_BLU[0]
    assert set(features[1:].unique().tolist()) == {-1.0, 1.0}
    word = slice_of(encoder, 0)
    assert "a" in FUNCTION_WORDS
    assert features[0, word].abs().min() == 1
    assert features[0, word.stop :].abs().max() == 0


def test_distinct_ngrams_are_nearly_orthogonal():
    encoder = NgramTextEncoder(slices=[(0, 0, 256, False)])
    words = [f"word{i}" for i in range(300)]
    features = encoder.encode([" ".join(words[:100]), " ".join(words[100:200]), " ".join(words[200:])])[0]
    rows = features.flatten(0, 1)
    cosine = rows @ rows.T / 256 - torch.eye(300)
    assert cosine.abs().max() < 0.35  # 5.6 standard deviations of 1/sqrt(256)
    assert abs(float(cosine.square().mean()) * 256 - 1) < 0.05


def test_golden_values():
    # the same on every machine and version: a checkpoint depends on them
    features = NgramTextEncoder().encode(["a red circle"]).features_BLU[0]
    assert features[2, :12].int().tolist() == GOLDEN_WORD
    assert features[2, 48:60].int().tolist() == GOLDEN_BIGRAM
    assert features.sum(1).int().tolist() == GOLDEN_SUMS


GOLDEN_WORD = [1, -1, -1, -1, 1, 1, 1, -1, 1, 1, -1, -1]
GOLDEN_BIGRAM = [1, 1, -1, -1, 1, 1, -1, -1, 1, -1, -1, -1]
GOLDEN_SUMS = [-4, 24, -2]


def test_the_empty_caption_is_one_token_of_its_own():
    encoder = NgramTextEncoder()
    features, mask = encoder.encode(["", " \n"])
    assert features.shape == (2, 1, 256)
    assert mask is None
    assert torch.equal(features[0], features[1])
    assert features.abs().min() == 1
    assert not torch.equal(features[0, 0, :48], at(encoder, "empty", "empty", 0))


def test_a_batch_is_padded_at_the_end_and_each_text_stands_alone():
    encoder = NgramTextEncoder()
    texts = ["a red circle", "", "two squares and a blue triangle"]
    features, mask = encoder.encode(texts)
    assert mask.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5, [True] * 6]
    for i, text in enumerate(texts):
        alone = NgramTextEncoder().encode([text])
        assert alone.mask_BL is None
        n = alone.features_BLU.shape[1]
        assert torch.equal(features[i, :n], alone.features_BLU[0])
        assert not features[i, n:].any()


def test_forgetting_changes_nothing():
    texts = [f"{a} {b} circle number {n}" for a in "uvw" for b in "xyz" for n in range(40)]
    small, large = NgramTextEncoder(cache_size=4), NgramTextEncoder()
    for start in range(0, len(texts), 10):
        assert torch.equal(
            small.encode(texts[start : start + 10])[0], large.encode(texts[start : start + 10])[0]
        )
    assert len(small._rows_of) <= 4
    assert small._ngrams < large._ngrams


def test_length_limit():
    encoder = NgramTextEncoder(max_tokens=5)
    with pytest.raises(ConfigError, match=r"7 tokens is longer than the limit of 5: 'one two"):
        encoder.encode(["one two three four five six seven"])
    assert encoder.encode(["one two three four five"]).features_BLU.shape[1] == 5
    cut = encoder.encode(["one two three four five six seven", "one"], truncate=True)
    assert encoder.truncated == 1
    same = NgramTextEncoder(max_tokens=7).encode(["one two three four five"])
    assert torch.equal(cut.features_BLU[0], same.features_BLU[0])
    with pytest.raises(ConfigError, match="limit of 5"):  # also when it is remembered
        encoder.encode(["one two three four five six seven"])
    assert EncoderConfig(max_text_tokens=9).text_spec()["max_tokens"] == 9


def test_text_spec_rebuilds_the_encoder():
    encoder = NgramTextEncoder(
        slices=[(0, 0, 7, False), (3, 3, 13, True)], max_tokens=9, function_words=["of"]
    )
    again = build_text_encoder(json.loads(json.dumps(encoder.spec())))
    assert again.spec() == encoder.spec()
    text = ["one of the two, of three"]
    assert torch.equal(again.encode(text)[0], encoder.encode(text)[0])
    assert again.dim == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NgramTextEncoder(slices=[]), "need left, right >= 0"),
        (lambda: NgramTextEncoder(slices=[(0, -1, 4, True)]), "need left, right >= 0"),
        (lambda: NgramTextEncoder(max_tokens=0), "max_text_tokens: must be at least 1"),
        (lambda: EncoderConfig(max_text_tokens=0).text_spec(), "max_text_tokens: must be at least 1"),
        (
            lambda: build_text_encoder({"name": "ngrams"}),
            r"text_encoder: 'ngrams' is unknown \(did you mean ngram\?\)",
        ),
        (lambda: build_text_encoder({"name": "ngram", "slice": []}), r"'slice' \(did you mean slices\?\)"),
    ],
)
def test_bad_text_encoders(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- configuration


@dataclasses.dataclass(frozen=True)
class Run:
    encoders: EncoderConfig


def test_config_section():
    config = from_dict(Run, {"encoders": {"latent_codec": "dct", "dct_coefficients": [16, 16, 16]}}).encoders
    assert build_codec(config.codec_spec()).channels == 48
    with pytest.raises(ConfigError, match=r"'dcd' is not allowed \(did you mean dct\?\)"):
        from_dict(Run, {"encoders": {"latent_codec": "dcd"}})
    with pytest.raises(ConfigError, match=r"unknown key 'encoders.codec' "):
        from_dict(Run, {"encoders": {"codec": "dct"}})
