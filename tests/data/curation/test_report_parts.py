"""The parts of the curation report: histograms, charts, the choice of examples, reasons, the funnel's picture."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from megatron_nucleus.data import images, index
from megatron_nucleus.data.curation import readers, recipe, report
from megatron_nucleus.data.curation.report import choose, funnel, pictures, reasons
from megatron_nucleus.data.curation.report.charts import Mark, histogram
from megatron_nucleus.data.curation.report.gather import Tally, _add_kept
from megatron_nucleus.data.curation.report.histograms import MAX_BINS, Histogram, Names, round_edges
from megatron_nucleus.data.curation.settings import CurationConfig

STAGES = str(Path(__file__).with_name("report_stages.py"))
HOSTILE = "</figcaption><script>alert(\"x\")</script><img src=x onerror=alert(1)> & \u2067right to left\u2069 'quoted'"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (4.99, 7.31), (-3.0, 250.0), (5.0, 5.0), (0.0, 0.0), (1e-6, 3e-6), (6.8, 6.9), (1e5, 1e9)],
)
def test_round_edges_hold_all_values_in_few_round_bins(low, high):
    edges = round_edges(low, high)
    values = np.array([low, high], np.float32)
    steps = np.diff(edges)
    assert len(steps) <= MAX_BINS + 1
    assert np.float32(edges[0]) <= values[0]
    assert values[1] < np.float32(edges[-1])
    assert np.allclose(steps, steps[0])
    assert np.any(np.isclose(steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9), [1, 2, 5]))


def test_a_histogram_counts_as_numpy_does():
    rng = np.random.default_rng(0)
    values, kept = rng.uniform(0, 10, 500).astype(np.float32), rng.random(500) < 0.7
    counted = Histogram(range(11))
    for chunk in np.array_split(np.arange(500), 7):
        counted.add(values[chunk], kept[chunk])
    counted.add(np.array([np.nan, 10.0], np.float32), True)
    assert np.array_equal(counted.kept, np.histogram(np.append(values[kept], 10), range(11))[0])
    assert np.array_equal(counted.other, np.histogram(values[~kept], range(11))[0])
    assert counted.mean() == pytest.approx(np.append(values[kept], 10).mean())
    with pytest.raises(AssertionError, match="outside 0 to 10"):
        counted.add(np.array([10.5]), True)


def test_a_stored_score_lies_in_the_bin_that_begins_with_it():
    counted = Histogram([6.4, 6.6, 6.8, 7.0])
    counted.add(np.array([6.6, 6.8], np.float32), True)  # 6.6 is stored a little lower, 6.8 a little higher
    assert counted.kept.tolist() == [0, 1, 1]


def test_places_on_linear_and_logarithmic_axes():
    assert Histogram([-np.inf, 0, 2, 4, np.inf]).place(3) == 2.5
    assert Histogram([0.0, 1.0, 10.0, 100.0], log=True).place(10**1.5) == pytest.approx(2.5)
    assert Histogram([0.0, 1.0, 10.0], log=True).place(0.5) is None
    assert Histogram([1.0, 2.0]).place(3) is None


def test_a_chart_spans_its_values_and_marks():
    counted = Histogram(np.arange(11.0), whole=True)
    counted.add(np.array([4.5, 4.6, 6.5]), np.array([True, False, True]))
    chart = histogram("A <title>", counted, "px", [Mark(8.0, "limit")])
    assert [tuple(bar) for bar in chart.bars] == [("4 px", 1, 1), ("6 px", 1, 0)]
    assert chart.svg.count("<rect") == 3
    assert "limit" in chart.svg
    assert "A &lt;title&gt;" in chart.svg
    assert ">9<" in chart.svg  # up to the bin of the mark
    assert ">2<" not in chart.svg.split('<line class="axis"')[1]


def test_names_beyond_a_limit_are_counted_together():
    names = Names()
    names.add([("b", 2), (None, 5), ("a", 2), ("c", 1)])
    assert names.largest(3) == [("none", 5), ("a", 2), ("b", 2), ("1 others", 1)]


def kept_table(ids, tiers, duplicates=None):
    columns = {
        "position": pa.array(range(len(ids)), pa.int32()),
        "id": ids,
        "item": [f"item {i}" for i in ids],
        "tier": pa.array(tiers, pa.string()),
    }
    if duplicates is not None:
        columns["duplicates"] = pa.array(duplicates, pa.list_(index.DUPLICATE_TYPE))
    return pa.table(columns)


def test_the_choice_does_not_depend_on_the_order_of_the_parts():
    rng = np.random.default_rng(1)
    parts = {}
    for p in range(5):
        ids = [rng.bytes(8).hex() for _ in range(40)]
        parts[f"p{p}"] = kept_table(ids, [("A1", "A3", None)[i % 3] for i in range(40)])
    chosen = []
    for order in (list(parts), list(parts)[::-1]):
        choice = choose.Choice()
        for part in order:
            choice.add_kept(part, parts[part])
        chosen.append((choice.kept(), choice.tiers()))
    assert chosen[0] == chosen[1]
    everything = sorted((i, p, n) for p, t in parts.items() for n, i in enumerate(t["id"].to_pylist()))
    assert chosen[0][0] == [(p, n) for _, p, n in everything[: choose.KEPT_EXAMPLES]]
    assert {tier: len(places) for tier, places in chosen[0][1].items()} == {"A1": 8, "A3": 8, None: 8}


def copies(*distances, relation="near_duplicate"):
    return [
        {
            "id": f"{d}{n}",
            "source_id": f"c{n}",
            "source_url": None,
            "licence": "x",
            "relation": relation,
            "distance": d,
        }
        for n, d in enumerate(distances)
    ]


def test_large_clusters_and_those_of_different_copies_are_chosen():
    lists = [copies(*[0] * n) for n in range(1, 15)] + [copies(d) for d in (1, 2, 3, 4)]
    lists += [copies(None, relation="exact_duplicate"), []]
    choice = choose.Choice()
    choice.add_kept("p", kept_table([f"{n:04x}" for n in range(len(lists))], [None] * len(lists), lists))
    positions = [place.position for place in choice.clusters()]
    assert positions[:6] == [13, 12, 11, 10, 9, 8]  # the largest
    assert positions[6:10] == [17, 16, 15, 14]  # the most different
    assert len(positions) == len(set(positions)) == choose.CLUSTERS
    assert [c["distance"] for c in choose.shown_copies(copies(1, 4, 2, 3, 0))] == [4, 3, 2, 1]


def test_every_reason_of_the_project_is_explained_with_knobs_that_exist():
    knobs = set(CurationConfig.__dataclass_fields__)
    known = {*images.UNUSABLE_REASONS, *readers.READ_REASONS, "process_crash"}
    for name, spec in recipe.BUILT_IN.items():
        stage = recipe.load_stage(spec)
        knobs |= set(stage.settings.__dataclass_fields__)
        known |= {*stage.rejects, *stage.quarantines, *stage.failures} - {f"{name}_failed"}
        assert name in reasons.STAGES
    tables = reasons._ANYWHERE | reasons._BUILT_IN
    assert known <= tables.keys()
    assert {knob for _, names in tables.values() for knob in names} <= knobs
    assert all(text.endswith(".") for text, _ in tables.values())


def test_the_limits_of_a_score_are_its_knobs():
    line = recipe.Line(
        "scores", recipe.BUILT_IN["score"], {"kind": "image_statistics", "min": 0.2, "metric": "m"}
    )
    found = reasons.explain(line, "low_score", CurationConfig())
    assert found == ("The score lies outside the limits.", (("min", "0.2"),))
    assert reasons.explain(line, "score_failed", CurationConfig()).text.startswith(
        "The stage ran into an error"
    )
    assert reasons.explain(line, "file_too_large", CurationConfig()).knobs == (
        ("max_file_bytes", "268,435,456 bytes"),
    )


def stage_result(name, arrived, rejected, quarantined):
    kept = arrived - sum(rejected.values()) - sum(quarantined.values())
    return SimpleNamespace(
        name=name, counts={"in": arrived, "kept": kept, "rejected": rejected, "quarantined": quarantined}
    )


def test_the_funnel_picture_is_drawn_to_scale():
    results = [
        stage_result("list", 1000, {}, {}),
        stage_result("look", 1000, {"small": 200}, {"$broken_": 50}),
        stage_result("again", 750, {f"reason{n}": 10 for n in range(7)}, {}),
    ]
    counts = {
        "seen": 1000,
        "kept": 680,
        "rejected": {"small": 200, "other": 70},
        "quarantined": {"$broken_": 50},
    }
    figure = report.funnel_figure(results, counts)
    (axes,) = figure.axes
    widths = [
        np.ptp(c.get_paths()[0].vertices[:, 0])
        for c in axes.collections
        if np.ptp(c.get_paths()[0].vertices[:, 0]) > 1
    ]
    assert widths == pytest.approx([funnel._STREAM_IN * n / 1000 for n in (1000, 750, 680)])
    bands = [(p.get_facecolor(), np.ptp(p.get_path().vertices[-8:, 0])) for p in axes.patches]
    assert len(bands) == 3
    thickness = [p.get_path().vertices[4, 1] - p.get_path().vertices[5, 1] for p in axes.patches]
    assert thickness == pytest.approx([funnel._STREAM_IN * n / 1000 for n in (200, 50, 70)])
    words = {t.get_text() for t in axes.texts}
    assert {
        "1,000 images came in",
        "200",
        "small",
        "$broken ",
        "20",
        "for 2 other reasons",
        "680 kept",
    } <= words
    assert "1,000 = 680 kept + 270 rejected + 50 quarantined" in words
    assert funnel.png(figure) == funnel.png(report.funnel_figure(results, counts))


def die(task):
    if task.container == b"poison":
        os.kill(os.getpid(), signal.SIGKILL)
    return pictures.Thumbnail(task.container.decode(), 1, 1)


def test_a_picture_that_takes_its_process_down_costs_that_picture_alone(monkeypatch):
    monkeypatch.setattr(pictures, "thumbnail", die)
    tasks = [pictures.PictureTask(None, name, None, None) for name in (b"a", b"poison", b"b", b"c")]
    drawn = pictures.draw([], tasks)
    assert {task.container: picture and picture.uri for task, picture in drawn.items()} == {
        b"a": "a", b"poison": None, b"b": "b", b"c": "c"
    }  # fmt: skip


def test_alignment_gate_and_costs_are_summed():
    caption = dict.fromkeys(index.CAPTION_TYPE.names) | {"text": "  two words ", "source": "web"}
    column = [
        [caption | {"alignment": 0.25}, caption | {"text": ""}],
        [],
        [caption | {"alignment": 0.5, "text": "a b c"}],
    ]
    table = pa.table(
        {
            "width_px": pa.array([10, 20, 40], pa.int32()),
            "height_px": pa.array([20, 20, 10], pa.int32()),
            "tier": ["A1", None, "A1"],
            "episode_bucket": ["B1", None, "B1"],
            "licence": ["x", "x", "y"],
            "captions": pa.array(column, pa.list_(index.CAPTION_TYPE)),
            "caption_gate": ["keep", "refine", "keep"],
            "caption_cost": [{"tokens_in": n, "tokens_out": 1, "cost": 0.5} for n in (1, 2, 3)],
            "duplicates": pa.array([copies(1), copies(*range(9)), None], pa.list_(index.DUPLICATE_TYPE)),
        }
    )
    tally = Tally(Histogram([0, 15, 100]), Histogram([0, 1, 10]), {}, {}, Histogram([0, 0.5, 1]))
    _add_kept(tally, table)
    assert tally.alignment.kept.tolist() == [1, 1]
    assert tally.words.kept[:2].tolist() == [1, 2]  # none; one to four
    assert tally.captions == {0: 1, 1: 1, 2: 1}
    assert tally.gates.counts == {"keep": 2, "refine": 1}
    assert tally.cost.tolist() == [6, 3, 1.5]
    assert tally.clusters == {"2": 1, "10 and more": 1}
    assert tally.cells == {("A1", "B1"): 2, (None, None): 1}
    assert tally.side_px.kept.tolist() == [2, 1]
    assert tally.aspect.kept.tolist() == [1, 2]
