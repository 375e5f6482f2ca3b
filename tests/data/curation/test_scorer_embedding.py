"""SigLIP, SigLIP 2 and CLIP scorers against transformers called by hand, on tiny models with random weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_nucleus.data.curation.scorers import model_files
from megatron_nucleus.data.curation.scorers.embedding import AlignmentScorer, DualEncoder, PromptScorer
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.tiny_encoders import TEXT_TOKENS, make_encoder

FAMILIES = ("siglip", "siglip2", "clip")
TEXTS = (
    "a photo of a red circle",
    "two cat",
    "a blue square and a cat",
    "A Blue Square AND a cat",
    "watermark " * 40,
)
MODELS = {
    "siglip": transformers.SiglipModel,
    "siglip2": transformers.Siglip2Model,
    "clip": transformers.CLIPModel,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: make_encoder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def encoders(folders):
    return {family: DualEncoder(str(folder), device="cpu") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def heap():
    rng = np.random.default_rng(0)
    sizes = ((40, 70), (64, 64), (90, 33), (200, 150), (32, 32))
    small = [Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [
        image.resize((w, h), Image.Resampling.BICUBIC) for image, (h, w) in zip(small, sizes, strict=True)
    ]


def pixels_by_hand(image: Image.Image, family: str) -> torch.Tensor:
    """[1, 3, 32, 32] as the tiny models' preprocessor_config.json says."""
    if family == "clip":  # shortest side 32, then the centre
        scale = 32 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        image = image.crop((left, top, left + 32, top + 32))
    else:
        image = image.resize((32, 32), Image.Resampling.BICUBIC)
    values = (np.asarray(image, np.float32) / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]


def text_inputs(folder, family: str, texts) -> dict:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    if family == "clip":
        return dict(
            tokenizer(texts, padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        )
    texts = [text.lower() for text in texts]
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
    )
    return {"input_ids": batch["input_ids"]}


def outputs(folder, family: str, image: Image.Image, texts):
    """transformers' own forward pass of the whole model, on one picture and all texts."""
    model = MODELS[family].from_pretrained(folder).eval()
    if family == "siglip2":
        processor = transformers.Siglip2ImageProcessorPil.from_pretrained(folder)
        pictures = dict(processor(images=[image], return_tensors="pt"))
    else:
        pictures = {"pixel_values": pixels_by_hand(image, family)}
    with torch.no_grad():
        return model, model(**pictures, **text_inputs(folder, family, list(texts)))


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_whole_model(folders, encoders, heap, family):
    encoder = encoders[family]
    texts = encoder.embed_texts(TEXTS)
    for image in heap:
        _, out = outputs(folders[family], family, image, TEXTS)
        assert encoder.embed([image])[0] == pytest.approx(out.image_embeds[0].numpy(), abs=1e-5)
        assert texts == pytest.approx(out.text_embeds.numpy(), abs=1e-5)
    assert encoder.dim == texts.shape[1] == (12 if family == "clip" else 16)
    assert encoder.side_px == 64  # twice the 32 px that the models see
    if family != "clip":  # SigLIP's texts are lower case
        assert np.array_equal(texts[2], texts[3])


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_alignment_is_the_sigmoid_of_the_models_own_logits(folders, encoders, heap, family):
    texts = TEXTS[:3]
    results = AlignmentScorer(encoders[family]).score(heap, [texts] * len(heap))
    for image, scored in zip(heap, results, strict=True):
        model, out = outputs(folders[family], family, image, texts)
        assert scored.captions == pytest.approx(torch.sigmoid(out.logits_per_image[0]).tolist(), abs=1e-5)
        cosines = (out.image_embeds @ out.text_embeds.T)[0]
        by_hand = 1 / (1 + torch.exp(-(model.logit_scale.exp() * cosines + model.logit_bias)))
        assert scored.captions == pytest.approx(by_hand.tolist(), abs=1e-5)
        assert scored.value == max(scored.captions)
    values = [scored.value for scored in results]
    assert max(values) - min(values) > 0.01  # the models tell these pictures apart


def test_alignment_with_clip_is_the_cosine(folders, encoders, heap):
    scored = AlignmentScorer(encoders["clip"]).score(heap[:1], [TEXTS[:2]])[0]
    _, out = outputs(folders["clip"], "clip", heap[0], TEXTS[:2])
    assert scored.captions == pytest.approx((out.image_embeds @ out.text_embeds.T)[0].tolist(), abs=1e-5)


def test_captions_stay_with_their_pictures(encoders, heap):
    scorer = AlignmentScorer(encoders["siglip"])
    captions = [TEXTS[:2], (), TEXTS[1:3], ("cat",), ()]
    results = scorer.score(heap, captions)
    alone = [scorer.score([image], [own])[0] for image, own in zip(heap, captions, strict=True)]
    assert results == alone
    assert results[1] == (None, ())
    assert [len(r.captions) for r in results] == [2, 0, 2, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_share_one_softmax(folders, encoders, heap, family):
    scorer = PromptScorer(encoders[family], TEXTS[:1], TEXTS[1:3])
    values = [scored.value for scored in scorer.score(heap, [()] * len(heap))]
    for image, value in zip(heap, values, strict=True):
        _, out = outputs(folders[family], family, image, TEXTS[:3])
        assert value == pytest.approx(torch.softmax(out.logits_per_image[0], 0)[0].item(), abs=1e-5)
    opposite = PromptScorer(encoders[family], TEXTS[1:3], TEXTS[:1])
    assert [s.value for s in opposite.score(heap, [()] * len(heap))] == pytest.approx([1 - v for v in values])
    assert scorer.revision != opposite.revision
    assert scorer.revision.startswith(encoders[family].revision)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_does_not_depend_on_its_batch(monkeypatch, folders, encoders, heap, family):
    encoder = encoders[family]
    together = encoder.embed(heap)
    assert np.array_equal(together, np.concatenate([encoder.embed([image]) for image in heap]))
    assert np.array_equal(together[::-1], encoder.embed(heap[::-1]))
    assert encoder.embed([]).shape == (0, encoder.dim)
    monkeypatch.setattr(encoder, "_batch_size", 3)  # as on a GPU
    assert encoder.embed(heap) == pytest.approx(together, abs=1e-5)


def test_half_precision_agrees_roughly(folders, encoders, heap):
    half = DualEncoder(str(folders["siglip"]), device="cpu", dtype="bfloat16")
    cosines = (half.embed(heap) * encoders["siglip"].embed(heap)).sum(axis=1)
    assert cosines.min() > 0.99
    assert np.linalg.norm(half.embed(heap), axis=1) == pytest.approx(1, abs=1e-5)  # normalised in float32


def test_revisions_follow_the_files_that_matter(folders, tmp_path):
    def facts(folder):
        return model_files.locate(str(folder))

    whole = facts(folders["siglip"])
    copy = shutil.copytree(folders["siglip"], tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert facts(copy)[2:] == whole[2:]
    assert (facts(copy).name, whole.name) == ("copy", "siglip")
    (copy / "tokenizer_config.json").write_text((copy / "tokenizer_config.json").read_text() + " ")
    assert facts(copy).revision != whole.revision
    assert facts(copy).checksum == whole.checksum  # a head on pictures stays good
    weights = load_file(copy / "model.safetensors")
    weights["logit_bias"] += 1  # the same names and sizes
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert facts(copy).checksum != whole.checksum


def test_damaged_and_foreign_folders_are_refused(folders, tmp_path):
    copy = shutil.copytree(folders["siglip"], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="1 weights are missing or misshapen, logit_scale first"):
        DualEncoder(str(copy))
    (copy / "model.safetensors").write_bytes((folders["siglip"] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be opened"):
        DualEncoder(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no model.safetensors"):
        DualEncoder(str(copy))
    shutil.copy(folders["siglip"] / "model.safetensors", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ConfigError, match="its model_type is 'bert', known are siglip, siglip2, clip"):
        DualEncoder(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        DualEncoder(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(DataError, match="config.json: no such file"):
        DualEncoder(str(copy))
    shutil.copy(folders["siglip"] / "config.json", copy)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="preprocessor_config.json cannot be used"):
        DualEncoder(str(copy))


def test_a_tokenizer_is_needed_for_texts_only(folders, tmp_path, heap):
    copy = shutil.copytree(folders["siglip"], tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    encoder = DualEncoder(str(copy))
    assert encoder.embed(heap).shape == (5, 16)
    with pytest.raises(ConfigError, match="the tokenizer of .*copy cannot be opened.*sentencepiece"):
        encoder.embed_texts(["a cat"])


def test_addresses_are_checked_before_anything_is_fetched(folders):
    folder, commit = str(folders["siglip"]), "0123456789" * 4
    with pytest.raises(ConfigError, match="model nowhere: no such folder, and no hub id"):
        model_files.check_address("nowhere", "")
    for revision in ("", "main"):
        with pytest.raises(ConfigError, match="a hub model needs the commit that is meant, 40 hex digits"):
            model_files.check_address("owner/name", revision)
    with pytest.raises(ConfigError, match="whose revision is its checksum"):
        model_files.check_address(folder, commit)
    model_files.check_address("owner/name", commit)
    model_files.check_address(folder, "")


def test_a_hub_model_is_its_commit_and_its_files_have_the_folders_checksum(monkeypatch, folders):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folders["clip"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    commit = "0123456789" * 4
    files = model_files.locate("owner/name", commit)
    assert (files.name, files.revision) == ("owner/name", commit)
    assert files.checksum == model_files.locate(str(folders["clip"])).checksum
    assert (asked["repo"], asked["revision"]) == ("owner/name", commit)
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])

    def offline(repo, **options):
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"the hub cannot give it now \(no route to the hub\)"):
        model_files.locate("owner/name", commit)
