"""The chosen images with their pictures and the words beneath them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_nucleus.data.curation.report import pictures
from megatron_nucleus.data.curation.report.choose import EXACT, Choice, shown_copies
from megatron_nucleus.data.curation.report.gather import kept_rows
from megatron_nucleus.data.curation.report.pictures import NEVER_DECODE, Thumbnail
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.data.curation.store import Store

_MAX_CHARACTERS = {"name": 60, "text": 170, "alt": 110}


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture with its words. picture: None where it cannot be shown. name: in the input."""

    picture: Thumbnail | None
    name: str
    facts: str
    text: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Examples:
    """All pictures of the page. tiers, clusters: as the template wants them. dropped: by (stage number, reason)."""

    kept: list[Example]
    tiers: list[dict[str, Any]]
    clusters: list[dict[str, Any]]
    dropped: dict[tuple[int, str], list[Example]]


def collect(store: Store, source: PayloadSource, choice: Choice) -> Examples:
    """Read and draw what was chosen; every picture once."""
    rows = kept_rows(
        store, {*choice.kept(), *choice.clusters(), *(p for t in choice.tiers().values() for p in t)}
    )
    reasons = choice.reasons()
    shown = [
        (level, row)
        for (level, reason), found in reasons.items()
        if reason not in NEVER_DECODE
        for row in found
    ]
    looked_at = store.owner(len(store.levels) - 1, "width_px") if rows or shown else 0
    decoded = [*rows.values(), *choice.copies.values(), *(row for level, row in shown if level > looked_at)]
    drawn = pictures.draw(
        [pictures.task_of(source, row) for row in decoded],
        [pictures.task_of(source, row) for level, row in shown if level <= looked_at],
    )
    maker = _Maker(source, drawn)
    return Examples(
        kept=[maker.kept(rows[place]) for place in choice.kept()],
        tiers=[
            {"title": tier or "Without a tier", "examples": [maker.kept(rows[place]) for place in places]}
            for tier, places in choice.tiers().items()
        ],
        clusters=[_cluster(maker, rows[place], choice.copies) for place in choice.clusters()],
        dropped={key: [maker.dropped(row) for row in found] for key, found in reasons.items()},
    )


def _cluster(
    maker: _Maker, row: Mapping[str, Any], copies: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    others = row["duplicates"]
    shown = shown_copies(others)
    same = sum(d["relation"] == EXACT for d in others)
    more = len(others) - len(shown) - same
    title = f"{len(others) + 1:,} images, one of them kept"
    left = [f"{n:,} {what}" for n, what in ((same, "with the same bytes"), (more, "more copies")) if n]
    title += f" (not shown: {', '.join(left)})" if left else ""
    made = [maker.copy(d, copies.get((d["source_id"], d["id"]))) for d in shown]
    return {"title": title, "kept": maker.kept(row), "copies": made}


class _Maker:
    """Puts pictures and words together."""

    def __init__(self, source: PayloadSource, drawn: Mapping[pictures.PictureTask, Thumbnail | None]):
        self._source, self._drawn = source, drawn

    def kept(self, row: Mapping[str, Any]) -> Example:
        caption = row["captions"][0]["text"] if row["captions"] else ""
        facts = _size(row)
        if row.get("scores"):
            facts += "; " + ", ".join(f"{s['scorer']} {s['value']:.3g}" for s in row["scores"][:3])
        return self._example(row, facts, caption, caption or row["item"])

    def dropped(self, row: Mapping[str, Any]) -> Example:
        return self._example(
            row, _size(row), row["detail"] or "", f"{row['item']}, not kept: {row['reason']}"
        )

    def copy(self, copy: Mapping[str, Any], row: Mapping[str, Any] | None) -> Example:
        facts = copy["relation"].replace("_", " ")
        if copy["distance"] is not None:
            facts += f", distance {copy['distance']}"
        if row is None:  # its bytes are not in this input: it came with a row that has copies already
            return Example(None, cut(copy["source_id"] or "", "name"), facts, "", "")
        if size := _size(row):
            facts += f"; {size}"
        return self._example(row, facts, "", f"copy: {row['item']}")

    def _example(self, row: Mapping[str, Any], facts: str, text: str, alt: str) -> Example:
        picture = self._drawn.get(pictures.task_of(self._source, row))
        return Example(picture, cut(row["item"], "name"), facts, cut(text, "text"), cut(alt, "alt"))


def _size(row: Mapping[str, Any]) -> str:
    if not row["width_px"] or not row["height_px"]:
        return ""
    return f"{row['width_px']} x {row['height_px']} px".replace(" ", "\u00a0")  # on one line


def cut(text: str, kind: str) -> str:
    """At most so many characters: the end of a name, the beginning of other texts."""
    limit = _MAX_CHARACTERS[kind]
    if len(text) <= limit:
        return text
    return "…" + text[-limit + 1 :] if kind == "name" else text[: limit - 1] + "…"
