"""The transformers captioner with a tiny model of random weights made on the spot."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nucleus.data.curation.captioners import desk, prompts
from megatron_nucleus.data.curation.captioners.ledger import Ledger
from megatron_nucleus.data.curation.captioners.protocol import Failure, Reply, Request
from megatron_nucleus.data.curation.captioners.settings import CaptionerConfig
from megatron_nucleus.data.curation.captioners.vision_language import VisionLanguageCaptioner, revision_of
from megatron_nucleus.utils.errors import ConfigError

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with two layers, saved as such models are."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([prompts.render("synthesise", "short", None)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        additional_special_tokens=specials[3:],
    )
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = transformers.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=32, **small)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, num_key_value_heads=4, **small
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, pad_token_id=0)
    )
    torch.manual_seed(2)  # with these weights the answer depends on picture and prompt
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = 2
    path = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def captioner(folder):
    return make(folder)


def make(folder, **settings):
    plain = {"max_new_tokens": NEW_TOKENS, "device": "cpu", "captioner_batch": 2}
    made = CaptionerConfig(captioner="transformers", model=str(folder), **(plain | settings))
    return VisionLanguageCaptioner(made, Ledger(made))


def request(seed, length="short", caption=None):
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    task = "synthesise" if caption is None else "refine"
    return Request(Image.fromarray(pixels), task, length, caption, prompts.render(task, length, caption))


def by_hand(folder, one):
    """The same caption with nothing but the model and its parts: (text, prompt tokens, new tokens)."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    inputs = processor(
        images=one.picture, text=f"user: <image>{one.prompt}\nassistant: ", return_tensors="pt"
    )
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):  # no cache, no generate: the likeliest token, again and again
            mask = torch.ones_like(ids)
            token = (
                model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])
                .logits[0, -1]
                .argmax()
            )
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
            if token == 2:
                break
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True), inputs["input_ids"].shape[1], len(new)


def test_equals_greedy_decoding_by_hand(folder, captioner):
    one = request(1)
    ((number, reply),) = captioner.caption([one])
    assert (number, *reply[:3]) == (0, *by_hand(folder, one))
    assert reply.text
    assert reply.revision == captioner.revision


def test_a_batch_equals_single_calls(captioner):
    """Prompts of different lengths, so that padding is at work; an odd count, so that a batch is left over."""
    requests = [request(1), request(2, "detailed"), request(3, "medium", "a red circle on a table")]
    together = dict(captioner.caption(requests))
    assert [together[n] for n in range(3)] == [next(captioner.caption([one]))[1] for one in requests]
    others = [request(4), request(1, "medium")]  # another picture, another prompt
    assert len({reply.text for _, reply in [(0, together[0]), *captioner.caption(others)]}) == 3


def test_the_end_token_ends_an_answer(captioner, monkeypatch):
    """Make a token that the model writes the end: the answer stops behind it and counts as complete."""
    rows = []
    generate = captioner._model.generate
    monkeypatch.setattr(
        captioner._model, "generate", lambda **inputs: rows.append(generate(**inputs)) or rows[-1]
    )
    ((_, whole),) = captioner.caption([request(1)])
    written = rows[0][0, whole.tokens_in :].tolist()
    assert (whole.complete, whole.tokens_out) == (False, len(written))
    monkeypatch.setattr(captioner, "_ends", (written[3],))
    ((_, cut),) = captioner.caption([request(1)])
    first = written.index(written[3]) + 1
    assert (cut.complete, cut.tokens_out, cut.tokens_in) == (True, first, whole.tokens_in)
    assert cut.text == captioner._processor.tokenizer.decode(written[:first])


def test_marks_of_the_model_in_a_caption_fail_that_picture_alone(captioner):
    """Read as tokens they would be a second picture or the end of a turn."""
    requests = [request(1), request(2, caption="see <image> and</s>"), request(3)]
    answers = dict(captioner.caption(requests))
    assert isinstance(answers[1], Failure)
    assert "a mark of this model" in answers[1].detail
    assert [answers[0], answers[2]] == [dict(captioner.caption([r]))[0] for r in (requests[0], requests[2])]


def test_name_and_revision_of_a_folder(folder, captioner, tmp_path):
    assert captioner.name == "tiny-llava"
    copy = tmp_path / "tiny-llava"
    shutil.copytree(folder, copy)
    settings = CaptionerConfig(captioner="transformers", model=str(copy))
    assert revision_of(settings) == captioner.revision == desk.identity(settings)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert revision_of(settings) != captioner.revision
    with pytest.raises(ConfigError, match="model_revision v2: .* is a folder"):
        revision_of(dataclasses.replace(settings, model_revision="v2"))


def test_a_hub_id_needs_its_commit():
    commit = "0123456789abcdef0123456789abcdef01234567"
    settings = CaptionerConfig(captioner="transformers", model="some/model", model_revision=commit)
    assert revision_of(settings) == commit
    for revision in (None, "main", commit[:12]):
        with pytest.raises(ConfigError, match="set model_revision to the commit"):
            revision_of(dataclasses.replace(settings, model_revision=revision))


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model .*broken: cannot be loaded"):
        make(broken)
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        make(mute)


def test_a_tokenizer_without_padding_pads_all_the_same(folder, captioner, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    stored = json.loads((bare / "tokenizer_config.json").read_text())
    stored.pop("pad_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(stored))
    requests = [request(1), request(2, "detailed")]
    texts = [reply.text for _, reply in make(bare).caption(requests)]
    assert texts == [reply.text for _, reply in captioner.caption(requests)]


def test_gpus():
    settings = CaptionerConfig(captioner="transformers", model="m", device="cuda")
    assert desk.gpus(settings) == 1.0
    assert desk.gpus(dataclasses.replace(settings, device="auto")) == 0.0
    assert desk.gpus(CaptionerConfig()) == 0.0


def test_through_the_desk_a_cut_answer_is_no_caption(folder, captioner):
    settings = CaptionerConfig(captioner="transformers", model=str(folder), max_new_tokens=NEW_TOKENS)
    one = request(1)
    wish = desk.Wish("0" * 64, lambda: one.picture, "synthesise", "short")
    (failure,) = desk.Desk(settings, captioner, Ledger(settings)).answer([wish])
    assert isinstance(failure, Failure)
    assert f"cut off after {NEW_TOKENS} tokens" in failure.detail
    assert failure.tokens_out == NEW_TOKENS
    assert isinstance(next(captioner.caption([one]))[1], Reply)
