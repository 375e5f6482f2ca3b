"""From counted and chosen to HTML: what `template.TEMPLATE` is filled with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

import megatron_nucleus
from megatron_nucleus.data.curation.report import panels, reasons
from megatron_nucleus.data.curation.report.choose import REASON_EXAMPLES
from megatron_nucleus.data.curation.report.examples import Examples
from megatron_nucleus.data.curation.report.funnel import Loss
from megatron_nucleus.data.curation.report.gather import Gathered
from megatron_nucleus.data.curation.report.panels import Facts, plural
from megatron_nucleus.data.curation.report.template import TEMPLATE
from megatron_nucleus.utils.revision import git_commit


def render(facts: Facts, gathered: Gathered, examples: Examples) -> str:
    """The page as HTML; all names and texts of the input are escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["num"] = "{:,}".format
    why = _reasons(facts, set(examples.dropped))
    kept = bool(facts.counts["kept"])
    view = {
        "source": facts.source,
        "counts": facts.counts,
        "rejected": sum(facts.counts["rejected"].values()),
        "quarantined": sum(facts.counts["quarantined"].values()),
        "verdicts": reasons.VERDICTS,
        "tiles": _tiles(facts),
        "funnel": _funnel(facts, why),
        "reasons": list(why.values()),
        "charts": panels.charts(facts, gathered.tally) if kept else None,
        "unknown_sizes": gathered.tally.unknown_sizes,
        "fits": gathered.crop if kept else [],
        "crop_labels": list(gathered.crop[0]["cropped_histogram"]) if gathered.crop else [],
        "heat": panels.heat(gathered.tally) if kept else None,
        "caption_sentence": panels.caption_sentence(facts, gathered.tally) if kept else "",
        "duplicates": panels.duplicates(gathered.tally, examples.clusters),
        "kept": examples.kept,
        "tiers": examples.tiers,
        "dropped": [{**why[key]._asdict(), "examples": shown} for key, shown in examples.dropped.items()],
        "examples_per_reason": REASON_EXAMPLES,
        **_provenance(facts),
    }
    view["contents"] = _contents(view)
    return environment.from_string(TEMPLATE).render(view)


def _contents(view: Mapping[str, Any]) -> list[dict[str, str]]:
    charts = view["charts"]
    listed = [
        ("funnel", "Funnel", True),
        ("reasons", "Why not kept", view["reasons"]),
        ("sizes", "Sizes and shapes", charts),
        ("quality", "Quality", charts and charts["quality"]),
        ("tiers", "Tiers and episodes", view["heat"]),
        ("captions", "Captions", charts),
        ("origin", "Licences and notes", charts),
        ("duplicates", "Duplicates", view["duplicates"]),
        ("kept", "Kept images", view["kept"]),
        ("by-tier", "By tier", view["tiers"]),
        ("not-kept", "Images not kept", view["dropped"]),
        ("made", "How this was made", True),
    ]
    return [{"id": name, "title": title} for name, title, there in listed if there]


def _share(images: int, seen: int) -> str:
    """Per cent; what is there is never 0.0 %, and what is not all never 100.0 %."""
    space = "\u00a0"  # that does not break
    if not seen or images in (0, seen):
        return f"100{space}%" if images else f"0{space}%"
    percent = 100 * images / seen
    text = "under 0.1" if percent < 0.05 else "over 99.9" if percent >= 99.95 else f"{percent:.1f}"
    return f"{text}{space}%"


def _tiles(facts: Facts) -> list[dict[str, Any]]:
    counts = facts.counts
    tiles = [{"value": f"{counts['seen']:,}", "label": "images came in", "kind": None}]
    sums = {"kept": counts["kept"]} | {v: sum(counts[v].values()) for v in reasons.VERDICTS}
    tiles += [
        {"value": f"{n:,}", "label": f"{kind} ({_share(n, counts['seen'])})", "kind": kind}
        for kind, n in sums.items()
    ]
    if facts.packed is not None:
        shards = [packed.shard for packed in facts.packed.shards]
        captions = sum(counts["captions"].values())
        tiles.append({"value": f"{captions:,}", "label": "captions", "kind": None})
        size = sum(shard.bytes for shard in shards)
        tiles.append({"value": _bytes(size), "label": f"in {plural(len(shards), 'shard')}", "kind": None})
    return tiles


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


class Why(NamedTuple):
    """A reason of one stage, for the table and for its examples. id: of its anchors. shown: it has examples."""

    id: str
    stage: str
    verdict: str
    reason: str
    images: int
    share: str
    text: str
    knobs: tuple[tuple[str, str], ...]
    shown: bool


def _reasons(facts: Facts, shown: set[tuple[int, str]]) -> dict[tuple[int, str], Why]:
    """(number of the stage, reason) -> what is said of it, in the order of the recipe."""
    out = {}
    for level, (step, line) in enumerate(zip(facts.steps, facts.lines, strict=True), 1):
        for loss in step.losses:
            text, knobs = reasons.explain(line, loss.reason, facts.settings.curation)
            key = (level, loss.reason)
            out[key] = Why(
                id=f"{level}-{len(out)}",
                stage=step.name,
                verdict=loss.verdict,
                reason=loss.reason,
                images=loss.images,
                share=_share(loss.images, step.seen),
                text=text,
                knobs=knobs,
                shown=key in shown,
            )
    return out


def _funnel(facts: Facts, why: Mapping[tuple[int, str], Why]) -> list[dict[str, Any]]:
    rows = []
    for level, (step, line) in enumerate(zip(facts.steps, facts.lines, strict=True), 1):
        images = {
            "kept": step.kept,
            "rejected": step.lost("rejected"),
            "quarantined": step.lost("quarantined"),
        }
        widths = [(kind, f"{100 * n / max(step.seen, 1):.3f}") for kind, n in images.items() if n]
        rows.append(
            {
                "name": step.name,
                "does": reasons.what_it_does(line),
                "arrived": step.arrived,
                "kept": step.kept,
                "kept_share": _share(step.kept, step.seen),
                "widths": widths,
                "losses": [_loss_row(loss, why[level, loss.reason]) for loss in step.losses],
            }
        )
    return rows


def _loss_row(loss: Loss, why: Why) -> dict[str, Any]:
    return loss._asdict() | {"id": why.id, "share": why.share}


def _provenance(facts: Facts) -> dict[str, Any]:
    commit = git_commit()
    groups = [(line.name, line.load()[1]) for line in facts.lines]
    groups += [("readers", facts.settings.readers), ("curation", facts.settings.curation)]
    shards = [packed.shard for packed in facts.packed.shards] if facts.packed is not None else []
    size = _bytes(sum(shard.bytes for shard in shards))
    return {
        "parts": facts.parts,
        "shards": f"{plural(len(shards), 'shard')}, {size}" if shards else "none",
        "program": f"megatron_nucleus {megatron_nucleus.__version__}, "
        + (f"commit {commit}" if commit else "not from a git checkout"),
        "recipe": [
            {
                "name": result.name,
                "spec": _spec(line.spec),
                "version": result.version,
                "arrived": result.counts["in"],
                "kept": result.counts["kept"],
            }
            for line, result in zip(facts.lines, facts.results[1:], strict=True)
        ],
        "settings": [{"name": name, "rows": _setting_rows(group)} for name, group in groups],
    }


def _spec(spec: str) -> str:
    """A stage's place; of a file without the folders."""
    place, function = spec.rsplit(":", 1)
    return f"{Path(place).name}:{function}"


def _setting_rows(group: Any) -> list[tuple[str, str, str]]:
    return [
        (field.name, reasons.setting_text(group, field.name), field.metadata.get("help", ""))
        for field in dataclasses.fields(group)
    ]
