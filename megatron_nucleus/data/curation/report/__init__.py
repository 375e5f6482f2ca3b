"""``report.html``: what came in, what was kept, what was not and why, with pictures. One file, no network.

Everything is counted from the tables of the stages, a part of the input at a time, so memory does not grow with the
input. Pictures are chosen by the hash of their content, and nothing in the page depends on the time, the engine or
the number of workers: equal input gives equal bytes. There are at most `choose.MAX_PICTURES` of them, of
`pictures.THUMBNAIL_PX`: a few MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_nucleus.data.curation.report import gather
from megatron_nucleus.data.curation.report.examples import collect
from megatron_nucleus.data.curation.report.funnel import funnel_figure, png, steps_of
from megatron_nucleus.data.curation.report.page import render
from megatron_nucleus.data.curation.report.panels import Facts
from megatron_nucleus.data.curation.runner import Run
from megatron_nucleus.utils.files import write_atomic

__all__ = ["FUNNEL", "REPORT", "funnel_figure", "write"]

REPORT, FUNNEL = "report.html", "report_funnel.png"


def write(
    output: Path,
    source: Path,
    settings: Any,
    counts: Mapping[str, Any],
    results: Sequence[Any],
    run: Run,
    packed: Any,
) -> None:
    """Write `REPORT` and `FUNNEL` into ``output``.

    Args:
        settings: `settings.Settings`. counts: of the manifest. results: `results.StageResult` of every stage, the
            list of items first. packed: `pack.PackedSet`, None when nothing was kept.
    """
    gathered = gather.gather(run.store, run.parts, run.lines, packed.moved if packed is not None else {})
    facts = Facts(
        source=str(source).encode("utf-8", "backslashreplace").decode(),
        settings=settings,
        lines=run.lines,
        counts=counts,
        results=results,
        steps=steps_of(results),
        packed=packed,
        parts=len(run.parts),
    )
    page = render(facts, gathered, collect(run.store, run.source, gathered.choice))
    write_atomic(output / FUNNEL, png(funnel_figure(results, counts)))
    write_atomic(output / REPORT, page)
