"""Caption files: every accepted form gives its captions with provenance; what is wrong is named."""

from __future__ import annotations

import json

import pytest

from megatron_nucleus.data.curation.captions import length_class, merge_captions, parse_sidecars
from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.types import Caption


def parse(*files):
    return parse_sidecars([(n, c if isinstance(c, bytes) else c.encode()) for n, c in files])


def texts(data):
    return [c.text for c in data.captions]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"caption": "a dog"}', ["a dog"]),
        ('{"captions": ["a dog", "a cat"]}', ["a dog", "a cat"]),
        ('{"captions": [{"text": "a dog"}, "a cat"], "caption": "first"}', ["first", "a dog", "a cat"]),
        ('["a dog", {"text": "a cat"}]', ["a dog", "a cat"]),
        ('"a dog"', ["a dog"]),
        ('{"caption": ["a dog", "a cat"]}', ["a dog", "a cat"]),
        ('{"caption": {"text": "a dog"}}', ["a dog"]),
        ('{"captions": ["a dog", "a   dog", ""]}', ["a dog"]),
    ],
)
def test_json_forms(content, expected):
    assert texts(parse(("a.json", content))) == expected


def test_text_files():
    assert texts(parse(("a.txt", "\ufeff a dog\n on   a mat \n"))) == ["a dog on a mat"]
    assert parse(("a.TXT", "a dog")).captions[0] == Caption("a dog", "short", "txt file")


def test_provenance_is_kept():
    entry = {
        "text": "a dog",
        "length_class": "detailed",
        "source": "blip",
        "model": "BLIP-2",
        "model_revision": "r1",
        "prompt_hash": "ab",
        "alignment": 0.25,
    }
    data = parse(("a.json", json.dumps({"captions": [entry]})))
    assert data.captions == [Caption("a dog", "detailed", "blip", "BLIP-2", "r1", "ab", 0.25)]


def test_licence_url_attribution_and_the_rest():
    sidecar = {
        "caption": "a dog",
        "license": "CC-BY-4.0",
        "url": "https://e.org/1.jpg",
        "author": "Ann",
        "key": "000000001",
        "status": "success",
        "width": 640,
        "exif": "{}",
    }
    data = parse(("a.json", json.dumps(sidecar)))
    assert (data.licence, data.source_url, data.attribution) == ("CC-BY-4.0", "https://e.org/1.jpg", "Ann")
    assert data.metadata == {"key": "000000001", "status": "success", "width": 640, "exif": "{}"}
    assert json.loads(data.metadata_json) == data.metadata
    plain = parse(("a.txt", "x"))
    assert (plain.licence, plain.source_url, plain.attribution, plain.metadata_json) == (
        "unknown",
        None,
        None,
        None,
    )
    british = {"caption": "x", "licence": "CC0-1.0", "source_url": "u", "attribution": "B", "license": 5}
    data = parse(("a.json", json.dumps(british)))
    assert (data.licence, data.source_url, data.attribution) == ("CC0-1.0", "u", "B")
    assert data.metadata == {"license": 5}


def test_json_wins_over_an_equal_text_and_other_texts_add_up():
    data = parse(("a.json", '{"captions": [{"text": "a dog", "source": "gen"}]}'), ("a.txt", "a dog"))
    assert data.captions == [Caption("a dog", "short", "gen")]
    assert texts(parse(("a.json", '"a dog"'), ("a.txt", "a hound"))) == ["a dog", "a hound"]


def test_length_classes_by_words():
    assert [length_class(" ".join(["w"] * n)) for n in (1, 12, 13, 40, 41)] == [
        "short",
        "short",
        "medium",
        "medium",
        "detailed",
    ]


def test_merging_keeps_order_and_the_first_of_equal_texts():
    first, again, other = Caption("a", source="1"), Caption("a", source="2"), Caption("b")
    assert merge_captions([first], [other, again]) == [first, other]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"caption": "a', "not valid JSON"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", '{"caption": 5}', "must be text"),
        ("a.json", '{"captions": [{"caption": "x"}]}', "must be text"),
        ("a.json", '{"captions": [{"text": "x", "length_class": "tiny"}]}', "one of short, medium, detailed"),
        ("a.json", '{"captions": [{"text": "x", "source": 4}]}', "must be text"),
        ("a.json", '{"captions": [{"text": "x", "alignment": true}]}', "must be a number"),
        ("a.json", '{"caption": "x", "score": NaN}', "NaN"),
        ("a.json", '{"caption": "bad \\ud800 half"}', "no valid Unicode"),
        ("a.json", '{"caption": "x", "url": "\\udfff"}', "no valid Unicode"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"\xff\xfea\0", "not UTF-8"),
        ("a.txt", b"x" * (1 << 20) + b"x", "limit"),
    ],
)
def test_what_is_wrong_is_named(name, content, message):
    with pytest.raises(UnusableImage, match=message) as caught:
        parse((name, content))
    assert caught.value.reason == "bad_caption"
    assert name in caught.value.detail


@pytest.mark.parametrize(
    "files", [[], [("a.txt", " \n")], [("a.json", '{"caption": null}')], [("a.json", "{}")]]
)
def test_no_caption_at_all(files):
    with pytest.raises(UnusableImage) as caught:
        parse(*files)
    assert caught.value.reason == "missing_caption"


def test_tier_and_episode_bucket_are_taken_out_of_the_metadata():
    data = parse(("a.json", '{"caption": "a dog", "tier": "A4", "episode_bucket": "B8", "camera": "x"}'))
    assert (data.tier, data.episode_bucket, data.metadata) == ("A4", "B8", {"camera": "x"})
    data = parse(("a.json", '{"caption": "a dog", "tier": null}'), ("a.txt", "a cat"))
    assert (data.tier, data.episode_bucket, data.metadata) == (None, None, {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('"tier": "A6"', "a.json: tier 'A6', one of A1, A2, A3, A4, A5"),
        ('"tier": 3', "a.json: tier 3, one of A1"),
        ('"tier": ["A1"]', r"a.json: tier ['A1'], one of A1"),
        ('"episode_bucket": "b1"', "a.json: episode_bucket 'b1', one of B1, B2, B3, B4, B5, B6, B7, B8"),
        ('"episode_bucket": ""', "a.json: episode_bucket '', one of B1"),
    ],
)
def test_an_unknown_tier_or_episode_bucket_is_named(entry, message):
    with pytest.raises(UnusableImage) as caught:
        parse(("a.json", '{"caption": "a dog", ' + entry + "}"))
    assert caught.value.reason == "bad_tier"
    assert message in caught.value.detail
