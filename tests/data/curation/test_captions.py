"""Caption files: every accepted form gives its captions with provenance; what is wrong is named."""

from __future__ import annotations

import json
import unicodedata

import pytest

from megatron_nucleus.data.curation.captions import (
    CAPTION_REASONS,
    MAX_CAPTION_CHARACTERS,
    forbidden_character,
    length_class,
    merge_captions,
    parse_given,
    parse_sidecars,
)
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
    laion = {"caption": "x", "LICENSE": "?", "URL": "u", "NSFW": "UNLIKELY"}
    data = parse(("a.json", json.dumps(laion)))
    assert (data.licence, data.source_url, data.metadata) == ("unknown", "u", {"NSFW": "UNLIKELY"})
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
        (
            "a.json",
            '{"caption": "bad \\ud800 half"}',
            "character 4 of the caption, U.D800 is half a surrogate pair",
        ),
        ("a.json", '{"captions": [{"text": "x", "source": "\\ud800"}]}', "no valid Unicode"),
        ("a.json", '{"caption": "x", "url": "\\udfff"}', "no valid Unicode"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", "a dog".encode("utf-16"), "UTF-16 .*save it as UTF-8"),
        ("a.json", '{"caption": "a dog"}'.encode("utf-16"), "UTF-16 .*save it as UTF-8"),
        ("a.txt", "a dog".encode("utf-16-le"), r"character 1 of the caption, U\+0000 is a control character"),
        ("a.txt", "bell\a", r"character 4 of the caption, U\+0007 is a control character"),
        ("a.txt", "a \x1f b", r"U\+001F is a control character"),
        ("a.txt", "w " * 50_000 + "w", "a caption of 100001 characters, limit 10000"),
        ("a.txt", b"x" * (1 << 20) + b"x", "limit"),
    ],
)
def test_what_is_wrong_is_named(name, content, message):
    with pytest.raises(UnusableImage, match=message) as caught:
        parse((name, content))
    assert caught.value.reason == "bad_caption"
    assert caught.value.reason in CAPTION_REASONS
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


FORBIDDEN = {
    *range(0x00, 0x09), *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0),
    *range(0xD800, 0xE000), *range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE),
    *range(0xFDD0, 0xFDF0), *(p << 16 | low for p in range(17) for low in (0xFFFE, 0xFFFF)),
    0xFFFD, 0x202D, 0x202E,
}  # fmt: skip


def test_forbidden_characters_are_these_and_no_others():
    """Against a list of code points, and against Unicode's categories where they say the same."""
    found = {code for code in range(0x110000) if forbidden_character(chr(code)) is not None}
    assert found == FORBIDDEN
    whole_categories = {c for c in range(0x110000) if unicodedata.category(chr(c)) in ("Cc", "Cs", "Co")}
    assert whole_categories - found == {ord(c) for c in "\t\n\v\f\r\x85"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\u00a0dog\u3000on\u2028a\tmat\x85now", "a dog on a mat now"),
        ("cafe\u0301", "caf\u00e9"),
        (
            "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
            "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        ),
        ("\u2067\u05e9\u05dc\u05d5\u05dd\u2069 as a sign", "\u2067\u05e9\u05dc\u05d5\u05dd\u2069 as a sign"),
        ("w" * MAX_CAPTION_CHARACTERS, "w" * MAX_CAPTION_CHARACTERS),
    ],
)
def test_white_space_is_collapsed_and_the_rest_brought_to_nfc(content, expected):
    assert texts(parse(("a.txt", content))) == [expected]
    assert texts(parse(("a.json", json.dumps(content)))) == [expected]


def test_captions_that_differ_in_form_alone_are_one():
    assert texts(parse(("a.json", '"caf\\u00e9  au lait"'), ("a.txt", "cafe\u0301 au\nlait"))) == [
        "caf\u00e9 au lait"
    ]


def test_a_bad_caption_among_good_ones_is_left_out_counted_and_described():
    captions = ["a dog", "bell \u0007", "w" * (MAX_CAPTION_CHARACTERS + 1), {"text": "\ufffd"}]
    data = parse(("a.json", json.dumps({"captions": captions, "camera": "x"})), ("a.txt", b"caf\xe9"))
    assert texts(data) == ["a dog"]
    assert data.notes == ["caption_dropped"] * 4
    assert data.metadata["camera"] == "x"
    assert data.metadata["dropped_captions"] == [
        "a.json: character 5 of the caption, U+0007 is a control character",
        "a.json: a caption of 10001 characters, limit 10000",
        "a.json: character 0 of the caption, U+FFFD is the mark of text that was lost",
        "a.txt: not UTF-8 (unexpected end of data at byte 3); save it as UTF-8",
    ]
    assert json.loads(data.metadata_json) == data.metadata
    assert parse(("a.txt", "a dog")).notes == []


def test_the_row_of_a_table_comes_first_and_files_add_to_it():
    given = json.dumps(
        {
            "caption": ["a dog", "a pup"],
            "licence": "CC0-1.0",
            "url": "u1",
            "tier": "A3",
            "camera": "x",
            "n": 1,
        }
    )
    side = {"captions": ["a hound", "a dog"], "licence": "MIT", "author": "Ann", "tier": "A1", "camera": "y"}
    data = parse_sidecars([("a.json", json.dumps(side).encode()), ("a.txt", b"a dog")], given)
    assert data.captions == [
        Caption("a dog", "short", "table"),
        Caption("a pup", "short", "table"),
        Caption("a hound", "short", "json file"),
    ]
    assert (data.licence, data.source_url, data.attribution, data.tier) == ("CC0-1.0", "u1", "Ann", "A3")
    assert data.metadata == {"camera": "x", "n": 1}
    alone = parse_given(given)
    assert texts(alone) == ["a dog", "a pup"]
    assert parse_given('{"licence": "MIT"}').captions == []
    with pytest.raises(UnusableImage, match="the table's row: a caption must be text"):
        parse_given('{"caption": 5}')
    with pytest.raises(UnusableImage, match="bad_tier: the table's row: tier 'A9'"):
        parse_given('{"caption": "x", "tier": "A9"}')
    with pytest.raises(UnusableImage, match="bad_tier: a.json"):
        parse_sidecars([("a.json", b'{"tier": "A9"}')], given)


def test_captions_may_be_missing_where_a_later_stage_writes_them():
    data = parse_sidecars([("a.json", b'{"license": "MIT", "k": 1}')], require_captions=False)
    assert (data.captions, data.licence, data.metadata) == ([], "MIT", {"k": 1})
    data = parse_sidecars([("a.txt", b"\a")], require_captions=False)
    assert (data.captions, data.notes) == ([], ["caption_dropped"])
