"""Captions and provenance from the ``.txt`` and ``.json`` files beside an image, and from the row of a table.

- ``.txt``: the whole file is one caption.
- ``.json``: text; a list of captions; or an object with ``caption`` or ``captions``, each text or a list. A caption in
  a list is text or an object with ``text`` and optionally ``length_class``, ``source``, ``model``,
  ``model_revision``, ``prompt_hash`` and ``alignment``. An object may also carry where the image comes from, under
  any name in `PROVENANCE_KEYS`, in any case (``LICENSE``), and ``tier`` and ``episode_bucket``, the image's place in a
  curriculum; its other keys are kept as metadata.
- A row of a table is an object of the same kind (`parse_given`).

Of equal captions the first counts, in the order row, ``.json``, ``.txt``; licence and the like come from the first that
names one. Text is read by one rule: white space is collapsed to single spaces and the rest is brought to Unicode's
form NFC, as text encoders do. Nothing else is changed. A caption that is not UTF-8, is longer than
`MAX_CAPTION_CHARACTERS`, or holds a character that no writer meant (`forbidden_character`) is not repaired: where the
image has another caption it is left out, counted as note ``caption_dropped`` and described in the metadata, else the
image is quarantined (``bad_caption``). A ``.json`` that cannot be understood, or a file that is not a caption's by its
size, quarantines the image in any case: the licence may be in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from typing import Any, NoReturn

from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.types import Caption

MAX_SIDECAR_BYTES = 1 << 20
MAX_CAPTION_CHARACTERS = 10_000  # own choice: twice what fills the text encoder's 1,024 tokens
LENGTH_CLASSES = ("short", "medium", "detailed")
SHORT_WORDS, MEDIUM_WORDS = 12, 40  # our own limits; captions of the published corpus average about 50 words
CAPTION_REASONS = frozenset({"bad_caption", "missing_caption", "bad_tier"})  # all that parsing raises
CAPTION_DROPPED = "caption_dropped"  # the note
DROPPED_KEY = "dropped_captions"  # in the metadata: what was wrong with each

# What a key or column is called, the first that is there and not empty counts.
PROVENANCE_KEYS = {
    "licence": ("licence", "license"),
    "source_url": ("source_url", "url", "image_url"),
    "attribution": ("attribution", "author", "creator"),
}
_OPTIONAL_TEXT = ("model", "model_revision", "prompt_hash")
_FORBIDDEN = (
    # Unicode's white space has no more control characters than these six: tab, LF, VT, FF, CR, NEL
    ("a control character", r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"),
    ("half a surrogate pair", r"\ud800-\udfff"),
    ("a character for private use", r"\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"),
    (
        "no character",
        r"\ufdd0-\ufdef" + "".join(rf"\U{plane:04x}fffe\U{plane:04x}ffff" for plane in range(17)),
    ),
    ("the mark of text that was lost", r"\ufffd"),
    ("an override of the direction of writing", r"\u202d\u202e"),
)
_ANY_FORBIDDEN = re.compile("[" + "".join(ranges for _, ranges in _FORBIDDEN) + "]")


@dataclasses.dataclass
class SideData:
    """What the files and the row that belong to an image say.

    notes: codes of harmless oddities, one per occurrence (``caption_dropped``).
    """

    captions: list[Caption] = dataclasses.field(default_factory=list)
    licence: str = "unknown"
    source_url: str | None = None
    attribution: str | None = None
    tier: str | None = None  # one of `index.TIERS`
    episode_bucket: str | None = None  # one of `index.EPISODE_BUCKETS`
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata_json: str | None = None  # the same, sorted; None when empty
    notes: list[str] = dataclasses.field(default_factory=list)


class _BadText(Exception):
    """A caption whose text cannot be used; the image may have others."""


def length_class(text: str) -> str:
    """``short`` up to 12 words, ``medium`` up to 40, else ``detailed``."""
    words = len(text.split())
    return "short" if words <= SHORT_WORDS else "medium" if words <= MEDIUM_WORDS else "detailed"


def merge_captions(*groups: list[Caption]) -> list[Caption]:
    """Captions in order, of equal texts the first."""
    merged: dict[str, Caption] = {}
    for group in groups:
        for caption in group:
            merged.setdefault(caption.text, caption)
    return list(merged.values())


def forbidden_character(text: str) -> tuple[int, str] | None:
    """Position of the first character that no caption may hold, and what it is; None: there is none.

    Forbidden are control characters that are no white space, halves of surrogate pairs, characters for private use,
    non-characters, U+FFFD (which stands for text that a program lost), and the two overrides of the direction of
    writing (which make a text read otherwise than it is stored). Embeddings, isolates and joiners are allowed: scripts
    and emoji need them.
    """
    found = _ANY_FORBIDDEN.search(text)
    if found is None:
        return None
    kind = next(name for name, ranges in _FORBIDDEN if re.match(f"[{ranges}]", found.group()))
    return found.start(), f"U+{ord(found.group()):04X} is {kind}"


def normalise(text: str) -> str:
    """A caption as it is stored: white space collapsed, Unicode NFC."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def parse_sidecars(
    files: list[tuple[str, bytes]], given: str | None = None, *, require_captions: bool = True
) -> SideData:
    """Read ``(name, content)`` of the caption files of one image, and the row ``given`` for it (see `parse_given`).

    require_captions: whether an image must have one; off where a later stage writes them: then a bad caption is left
        out even where it is the only one.

    Raises:
        UnusableImage: bad_caption or bad_tier, naming the file and what is wrong; missing_caption when none has any
            text.
    """
    data, bad = SideData(), []
    if given is not None:
        bad += _parse_json("the table's row", given, data, "table")
    for name, content in files:
        if len(content) > MAX_SIDECAR_BYTES:
            raise UnusableImage("bad_caption", f"{name}: {len(content)} bytes, limit {MAX_SIDECAR_BYTES}")
        if name.lower().endswith(".json"):
            try:
                text = _decode(name, content)
            except _BadText as problem:
                raise UnusableImage("bad_caption", str(problem)) from problem
            bad += _parse_json(name, text, data, "json file")
        else:
            try:
                _add_caption(name, _decode(name, content), {"source": "txt file"}, data)
            except _BadText as problem:
                bad.append(str(problem))
    return _finish(data, bad, require_captions)


def parse_given(text: str) -> SideData:
    """What the row of a table says: a JSON object with the keys of a ``.json`` file; it may have no caption.

    Raises:
        UnusableImage: bad_caption or bad_tier.
    """
    return parse_sidecars([], text, require_captions=False)


def _finish(data: SideData, bad: list[str], require_captions: bool) -> SideData:
    data.captions = merge_captions(data.captions)
    if bad and not data.captions and require_captions:
        raise UnusableImage("bad_caption", bad[0])
    if bad:
        data.notes += [CAPTION_DROPPED] * len(bad)
        data.metadata[DROPPED_KEY] = bad
    if data.metadata:
        try:
            data.metadata_json = json.dumps(data.metadata, sort_keys=True)
        except RecursionError as error:
            raise UnusableImage("bad_caption", "metadata nested too deep") from error
    if not data.captions and require_captions:
        raise UnusableImage(
            "missing_caption", "no .txt or .json with a caption beside it, and no row with one"
        )
    return data


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
        raise _BadText(f"{name}: {guess} ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _parse_json(name: str, text: str, data: SideData, source: str) -> list[str]:
    """Add what a JSON text says; returns what is wrong with captions that were left out."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnusableImage("bad_caption", f"{name}: not valid JSON ({error})") from error
    entries = _take_fields(name, dict(value), data) if isinstance(value, dict) else [value]
    bad = []
    for entry in entries:
        for caption in entry if isinstance(entry, list) else [entry]:
            try:
                _add_json_caption(name, caption, data, source)
            except _BadText as problem:
                bad.append(str(problem))
    return bad


def _take_fields(name: str, value: dict, data: SideData) -> list[Any]:
    """Provenance, place in the curriculum and metadata from an object; returns its captions as they are."""
    licence, url, attribution = (_take_text(name, value, keys) for keys in PROVENANCE_KEYS.values())
    if data.licence == "unknown" and licence not in (None, "?"):  # "?" is how LAION's tables say unknown
        data.licence = licence
    data.source_url = data.source_url or url
    data.attribution = data.attribution or attribution
    tier, bucket = (
        _choice(name, value, "tier", TIERS),
        _choice(name, value, "episode_bucket", EPISODE_BUCKETS),
    )
    data.tier, data.episode_bucket = data.tier or tier, data.episode_bucket or bucket
    entries = [value.pop(key) for key in ("caption", "captions") if value.get(key) is not None]
    for key, entry in value.items():
        if key not in ("caption", "captions", "tier", "episode_bucket"):
            data.metadata.setdefault(key, entry)
    return entries


def _add_json_caption(name: str, value: Any, data: SideData, source: str) -> None:
    if isinstance(value, str):
        _add_caption(name, value, {"source": source}, data)
        return
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UnusableImage("bad_caption", f"{name}: a caption must be text or an object with 'text'")
    fields: dict[str, Any] = {"source": value.get("source") or source}
    if (given := value.get("length_class")) is not None:
        if given not in LENGTH_CLASSES:
            raise UnusableImage(
                "bad_caption", f"{name}: length_class {given!r}, one of {', '.join(LENGTH_CLASSES)}"
            )
        fields["length_class"] = given
    fields.update({key: value[key] for key in _OPTIONAL_TEXT if value.get(key) is not None})
    if not all(isinstance(v, str) for v in fields.values()):
        raise UnusableImage("bad_caption", f"{name}: source and model of a caption must be text")
    for field in fields.values():
        _check_storable(name, field)
    if (alignment := value.get("alignment")) is not None:
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, (int, float))
            or not math.isfinite(alignment)
        ):
            raise UnusableImage("bad_caption", f"{name}: alignment must be a number")
        fields["alignment"] = float(alignment)
    _add_caption(name, value["text"], fields, data)


def _add_caption(name: str, text: str, fields: dict[str, Any], data: SideData) -> None:
    if (found := forbidden_character(text)) is not None:
        raise _BadText(f"{name}: character {found[0]} of the caption, {found[1]}")
    text = normalise(text)
    if not text:
        return
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise _BadText(f"{name}: a caption of {len(text)} characters, limit {MAX_CAPTION_CHARACTERS}")
    if "length_class" not in fields:
        fields["length_class"] = length_class(text)
    data.captions.append(Caption(text=text, **fields))


def _take_text(file: str, value: dict, names: tuple[str, ...]) -> str | None:
    """Remove and return the first of the keys, in any case, that holds text; other types stay in the metadata."""
    spelled: dict[str, list[str]] = {}
    for key in value:
        spelled.setdefault(key.lower(), []).append(key)
    for key in (key for name in names for key in spelled.get(name, ())):
        if isinstance(value[key], str) and value[key].strip():
            text = value.pop(key).strip()
            _check_storable(file, text)
            return text
    return None


def _choice(file: str, value: dict, name: str, allowed: tuple[str, ...]) -> str | None:
    """One of the allowed names; None where the key is absent or null."""
    given = value.get(name)
    if given is not None and given not in allowed:
        raise UnusableImage("bad_tier", f"{file}: {name} {given!r:.60}, one of {', '.join(allowed)}")
    return given


def _check_storable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableImage(
            "bad_caption", f"{name}: text that is no valid Unicode ({error.reason})"
        ) from error
