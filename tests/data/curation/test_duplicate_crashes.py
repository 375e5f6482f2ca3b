"""A picture whose full decoding ends the process costs itself alone, also among candidates for copies."""

from __future__ import annotations

import pytest
from PIL import ImageOps

from megatron_nucleus.data.curation import picture_tasks, pipeline
from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.stages import exact_duplicates
from megatron_nucleus.data.index import INDEX_SCHEMA, QUARANTINE_SCHEMA
from tests.data.curation.helpers import encode, files_of, make_settings, table, write_captioned


class Crash(BaseException):
    """Stands for the end of the process."""


class Fragile:
    """An engine in this process; where a task crashes, the one before it is lost with it."""

    def map(self, function, tasks, gpus=0.0):
        results = [(task, self.alone(function, task)) for task in tasks]
        for at, (task, result) in enumerate(results):
            follower = results[at + 1][1] if at + 1 < len(results) else None
            yield task, WorkerDied("beside it") if isinstance(follower, WorkerDied) else result

    def alone(self, function, task, gpus=0.0):
        try:
            return function(task)
        except Crash:
            return WorkerDied("the process ended")

    def close(self):
        pass


@pytest.fixture
def source(tmp_path, photos, monkeypatch):
    """Four pictures with a copy of other bytes each; ``b`` is there twice in the same bytes, too."""
    monkeypatch.setattr(picture_tasks, "PICTURES_PER_TASK", 2)
    picture = photos["coffee.png"].convert("RGB").resize((160, 128))
    turned = {
        "a": picture,
        "b": ImageOps.mirror(picture),
        "c": ImageOps.flip(picture),
        "d": picture.rotate(180),
    }
    pictures = {}
    for name, image in turned.items():
        pictures[f"{name}1.png"] = encode(image, compress_level=1)
        pictures[f"{name}2.png"] = encode(image, compress_level=9)
    pictures["b3.png"] = pictures["b1.png"]
    return write_captioned(tmp_path / "in", pictures)


@pytest.fixture
def deadly(monkeypatch):
    """Items on which `pixel_sums` takes its process down."""
    items = set()
    original = exact_duplicates.pixel_sums

    def sums(task):
        if items & {reference["item"] for reference in task.references}:
            raise Crash
        return original(task)

    monkeypatch.setattr(exact_duplicates, "pixel_sums", sums)
    monkeypatch.setattr(pipeline, "open_engine", lambda config: Fragile())
    return items


def test_it_is_quarantined_with_the_copies_of_its_bytes_and_tried_again_when_asked(source, tmp_path, deadly):
    settings = make_settings(["inspect", "exact_duplicates"])
    whole = curate(source, tmp_path / "whole", settings)
    assert (whole["kept"], sum(whole["rejected"].values())) == (4, 5)
    deadly |= {"b1.png", "b3.png", "d2.png"}
    result = curate(source, tmp_path / "out", settings)
    assert (result["rejected"], result["quarantined"]) == ({"pixel_duplicate": 2}, {"process_crash": 3})
    rows = table(tmp_path / "out" / "quarantine", QUARANTINE_SCHEMA)
    crashed = [(r["item"], r["verdict"], r["detail"]) for r in rows if r["reason"] == "process_crash"]
    detail = "decoding it ended the whole process"
    assert crashed == [(name, "quarantined", detail) for name in ("b1.png", "b3.png", "d2.png")]
    kept = {row["source_id"] for row in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert {"b2.png", "d1.png"} < kept
    assert len(kept) == 4  # and one each of a and c
    assert result["retryable"] == 3
    deadly.clear()
    assert curate(source, tmp_path / "out", settings)["already_complete"]
    curate(source, tmp_path / "out", settings, retry_failed=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
