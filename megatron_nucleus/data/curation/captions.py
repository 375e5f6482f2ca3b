"""Captions and provenance from the ``.txt`` and ``.json`` files beside an image.

- ``.txt``: the whole file is one caption, white space collapsed.
- ``.json``: text; a list of captions; or an object with ``caption`` (text) or ``captions`` (a list). A caption in a
  list is text or an object with ``text`` and optionally ``length_class``, ``source``, ``model``,
  ``model_revision``, ``prompt_hash`` and ``alignment``. An object may also carry ``licence`` (or ``license``),
  ``source_url`` (or ``url``) and ``attribution`` (or ``author``), and ``tier`` and ``episode_bucket``, the image's
  place in a curriculum; its other keys are kept as metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, NoReturn

from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.types import Caption

MAX_SIDECAR_BYTES = 1 << 20
LENGTH_CLASSES = ("short", "medium", "detailed")
SHORT_WORDS, MEDIUM_WORDS = 12, 40  # our own limits; captions of the published corpus average about 50 words
_OPTIONAL_TEXT = ("model", "model_revision", "prompt_hash")


@dataclasses.dataclass
class SideData:
    """What the files beside an image say."""

    captions: list[Caption] = dataclasses.field(default_factory=list)
    licence: str = "unknown"
    source_url: str | None = None
    attribution: str | None = None
    tier: str | None = None  # one of `index.TIERS`
    episode_bucket: str | None = None  # one of `index.EPISODE_BUCKETS`
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata_json: str | None = None  # the same, sorted; None when empty


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


def parse_sidecars(files: list[tuple[str, bytes]]) -> SideData:
    """Read ``(name, content)`` of the caption files of one image.

    Raises:
        UnusableImage: bad_caption or bad_tier, naming the file and what is wrong; missing_caption when none has any
            text.
    """
    data = SideData()
    for name, content in files:
        if len(content) > MAX_SIDECAR_BYTES:
            raise UnusableImage("bad_caption", f"{name}: {len(content)} bytes, limit {MAX_SIDECAR_BYTES}")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnusableImage(
                "bad_caption", f"{name}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        if name.lower().endswith(".json"):
            _parse_json(name, text, data)
        else:
            _add_caption(name, text, {"source": "txt file"}, data)
    data.captions = merge_captions(data.captions)
    if data.metadata:
        try:
            data.metadata_json = json.dumps(data.metadata, sort_keys=True)
        except RecursionError as error:
            raise UnusableImage("bad_caption", f"{files[0][0]}: nested too deep") from error
    if not data.captions:
        raise UnusableImage("missing_caption", "no .txt or .json with a caption beside it")
    return data


def _parse_json(name: str, text: str, data: SideData) -> None:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UnusableImage("bad_caption", f"{name}: not valid JSON ({error})") from error
    if isinstance(value, dict):
        value = dict(value)
        data.licence = _take_text(name, value, "licence", "license") or data.licence
        data.source_url = _take_text(name, value, "source_url", "url") or data.source_url
        data.attribution = _take_text(name, value, "attribution", "author") or data.attribution
        data.tier = _take_choice(name, value, "tier", TIERS) or data.tier
        data.episode_bucket = (
            _take_choice(name, value, "episode_bucket", EPISODE_BUCKETS) or data.episode_bucket
        )
        entries = [value.pop(key) for key in ("caption", "captions") if value.get(key) is not None]
        data.metadata.update({k: v for k, v in value.items() if k not in ("caption", "captions")})
    else:
        entries = [value]
    for entry in entries:
        for caption in entry if isinstance(entry, list) else [entry]:
            _add_json_caption(name, caption, data)


def _add_json_caption(name: str, value: Any, data: SideData) -> None:
    if isinstance(value, str):
        _add_caption(name, value, {"source": "json file"}, data)
        return
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UnusableImage("bad_caption", f"{name}: a caption must be text or an object with 'text'")
    fields: dict[str, Any] = {"source": value.get("source") or "json file"}
    if (given := value.get("length_class")) is not None:
        if given not in LENGTH_CLASSES:
            raise UnusableImage(
                "bad_caption", f"{name}: length_class {given!r}, one of {', '.join(LENGTH_CLASSES)}"
            )
        fields["length_class"] = given
    fields.update({key: value[key] for key in _OPTIONAL_TEXT if value.get(key) is not None})
    if not all(isinstance(v, str) for v in fields.values()):
        raise UnusableImage("bad_caption", f"{name}: source and model of a caption must be text")
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
    text = " ".join(text.split())
    if not text:
        return
    _check_storable(name, " ".join([text, *(v for v in fields.values() if isinstance(v, str))]))
    if "length_class" not in fields:
        fields["length_class"] = length_class(text)
    data.captions.append(Caption(text=text, **fields))


def _take_text(file: str, value: dict, *names: str) -> str | None:
    """Remove and return the first of the keys that holds text; other types stay in the metadata."""
    for name in names:
        if isinstance(value.get(name), str) and value[name].strip():
            text = value.pop(name).strip()
            _check_storable(file, text)
            return text
    return None


def _take_choice(file: str, value: dict, name: str, allowed: tuple[str, ...]) -> str | None:
    """Remove and return one of the allowed names; None where the key is absent or null."""
    given = value.pop(name, None)
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
