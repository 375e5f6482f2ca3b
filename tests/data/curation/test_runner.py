"""The stage contract: counts reconcile, finished parts are not run again, a bad row costs one row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_nucleus.data.curation import corpus_stages
from megatron_nucleus.data.curation import store as tables
from megatron_nucleus.data.curation.engines.local import LocalEngine
from megatron_nucleus.data.curation.recipe import Line
from megatron_nucleus.data.curation.runner import Run, run_stage
from megatron_nucleus.data.curation.stage import PayloadSource, _source
from megatron_nucleus.data.curation.store import Level, Store
from megatron_nucleus.utils.errors import ConfigError, DataError

TOYS = str(Path(__file__).with_name("toy_stages.py"))
LISTED = pa.schema(
    [
        ("item", pa.string()),
        ("container", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("value", pa.int64()),
    ]
)
PARTS = {f"part-{i}": list(range(-1, 3 * i)) for i in range(4)}  # 1, 4, 7 and 10 rows, each with one negative


def line(function="double", **settings):
    return Line(function, f"{TOYS}:{function}", settings)


def make_run(work, lines, workers=1, retry=False, parts=None, stamp="s"):
    levels = [Level(0, "list", tuple(LISTED.names))]
    levels += [Level(n, one.name, tuple(one.load()[0].adds.names)) for n, one in enumerate(lines, 1)]
    store = Store(str(work), tuple(levels))
    for part, values in (parts or PARTS).items():
        rows = [
            {"position": i, "item": f"{part}/{i}", "container": b"x", "offset": None, "length": 9, "value": v}
            for i, v in enumerate(values)
        ]
        table = pa.Table.from_pylist(rows, schema=pa.schema([tables.POSITION, *LISTED]))
        store.write(
            0, part, table, tables.DROPPED_SCHEMA.empty_table(), version="", entry=stamp + str(values)
        )
    return Run(
        store, tuple(parts or PARTS), LocalEngine(workers, pool=workers > 1), PayloadSource("", 9, 9), retry
    )


def run_all(run, lines):
    try:
        return [run_stage(run, level, one) for level, one in enumerate(lines, 1)]
    finally:
        run.engine.close()


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def column(run, level, name):
    return [v for part in run.parts for v in run.store.read(level, part, [name])[name].to_pylist()]


def test_counts_columns_and_notes(tmp_path):
    run = make_run(tmp_path, [line()])
    (records,) = run_all(run, [line()])
    assert [r.counts["in"] for r in records] == [1, 4, 7, 10]
    assert [r.counts["kept"] for r in records] == [0, 3, 6, 9]
    assert all(r.counts["rejected"] == {"negative": 1} and not r.counts["quarantined"] for r in records)
    assert records[2].notes == {"even": 3}  # 0, 2, 4
    assert column(run, 1, "double") == [2 * v for values in PARTS.values() for v in values if v >= 0]
    assert column(run, 1, "value") == [v for values in PARTS.values() for v in values if v >= 0]
    dropped = run.store.dropped(1, "part-2").to_pylist()
    assert [
        (d["position"], d["item"], d["verdict"], d["reason"], d["detail"], d["retry"]) for d in dropped
    ] == [(0, "part-2/0", "rejected", "negative", "-1 is below 0", False)]
    summary = json.loads((tmp_path / "01-double" / "_SUCCESS.json").read_text())
    assert summary["parts"] == 4
    assert summary["counts"] == {"in": 22, "kept": 18, "rejected": {"negative": 4}, "quarantined": {}}


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(tmp_path, workers):
    lines = [line(), line("ranks")]
    run_all(make_run(tmp_path / "one", lines), lines)
    run_all(make_run(tmp_path / "many", lines, workers), lines)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


def test_a_corpus_stage_drops_and_changes_rows_of_all_parts(tmp_path):
    lines = [line(), line("ranks")]
    run = make_run(tmp_path, lines)
    _, records = run_all(run, lines)
    # 0..2 come first in part-1, 3..5 in part-2, 6..8 in part-3; every repetition goes.
    assert [r.counts["kept"] for r in records] == [0, 3, 3, 3]
    assert records[3].counts["rejected"] == {"repeated": 6}
    assert column(run, 2, "value") == list(range(9))
    assert column(run, 2, "double") == [0, 2, 4, 6, -1, -1, -1, -1, -1]
    assert column(run, 2, "rank") == [None] * 4 + [0, 1, 2, 3, 4]
    assert [d["detail"] for d in run.store.dropped(2, "part-2").to_pylist()] == [
        "0 again",
        "1 again",
        "2 again",
    ]
    assert not (tmp_path / "02-ranks" / ".work").exists()


def test_finished_parts_are_not_run_again(tmp_path):
    calls = tmp_path / "calls"
    settings = {"calls": str(calls)}
    work = tmp_path / "work"
    run_all(make_run(work, [line(**settings)]), [line(**settings)])
    before, files = calls.read_text(), files_of(work)
    run_all(make_run(work, [line(**settings)]), [line(**settings)])
    assert calls.read_text() == before
    assert files_of(work) == files
    # A part that is not there runs again, alone.
    shutil.rmtree(work / "01-double" / "part-2")
    run_all(make_run(work, [line(**settings)]), [line(**settings)])
    assert calls.read_text() == before + "-1 0 1 2\n3 4 5\n"
    assert files_of(work) == files
    # So does one whose input changed, and every part after a change of the settings.
    other = {**PARTS, "part-1": [7]}
    run_all(make_run(work, [line(**settings)], parts=other), [line(**settings)])
    assert calls.read_text() == before + "-1 0 1 2\n3 4 5\n7\n"
    run_all(make_run(work, [line(factor=3, **settings)], parts=other), [line(factor=3, **settings)])
    assert calls.read_text().count("\n") == 2 * before.count("\n") + 3


def test_a_changed_stage_makes_those_after_it_run_again_only_where_it_matters(tmp_path):
    lines = [line(), line("ranks")]
    run = make_run(tmp_path, lines)
    _, first = run_all(run, lines)
    _, again = run_all(make_run(tmp_path, lines), lines)
    assert again == first
    lines = [line(factor=5), line("ranks")]
    run = make_run(tmp_path, lines)
    _, changed = run_all(run, lines)
    assert column(run, 2, "double")[:4] == [0, 5, 10, 15]
    assert all(a.input != b.input for a, b in zip(first, changed, strict=True))


def test_a_row_on_which_the_stage_raises_is_quarantined_alone(tmp_path):
    run = make_run(tmp_path, [line(raises=(1, 4))])
    (records,) = run_all(run, [line(raises=(1, 4))])
    assert [r.counts["quarantined"] for r in records] == [
        {},
        {"double_failed": 1},
        {"double_failed": 2},
        {"double_failed": 2},
    ]
    assert column(run, 1, "value") == [0, 2, 0, 2, 3, 5, 0, 2, 3, 5, 6, 7, 8]
    dropped = run.store.dropped(1, "part-1").to_pylist()[1]
    assert (dropped["detail"], dropped["retry"]) == ("ValueError: no double of [1]", True)


def test_a_row_that_takes_the_process_down_is_quarantined_alone(tmp_path):
    lines = [line(poison=(4,))]
    run = make_run(tmp_path, lines, workers=2)
    (records,) = run_all(run, lines)
    assert [r.counts["quarantined"] for r in records] == [{}, {}, {"process_crash": 1}, {"process_crash": 1}]
    assert column(run, 1, "value") == [v for values in PARTS.values() for v in values if v >= 0 and v != 4]
    assert not list(tmp_path.rglob(".*"))


def test_only_failed_rows_are_tried_again(tmp_path):
    away, calls = tmp_path / "away", tmp_path / "calls"
    away.touch()
    settings = {"unreachable": str(away), "calls": str(calls)}
    lines = [line(**settings), line("ranks")]
    work = tmp_path / "work"
    first, _ = run_all(make_run(work, lines), lines)
    assert [r.retry for r in first] == [0, 1, 2, 2]
    calls.write_text("")
    run_all(make_run(work, lines), lines)
    assert calls.read_text() == ""  # without being asked nothing is tried again
    away.unlink()
    run = make_run(work, lines, retry=True)
    again, ranked = run_all(run, lines)
    assert calls.read_text() == "0\n0 5\n0 5\n"
    assert [r.retry for r in again] == [0, 0, 0, 0]
    # The result is that of a run in which nothing failed.
    other = [line(unreachable=str(away), calls=str(calls)), line("ranks")]
    clean, clean_ranked = run_all(make_run(tmp_path / "clean", other), other)
    assert [r.result for r in clean_ranked] == [r.result for r in ranked]
    assert [r.counts for r in clean] == [r.counts for r in again]


def test_a_wrong_setting_stops_the_stage(tmp_path):
    with pytest.raises(ConfigError, match="the server refuses the key"):
        run_all(make_run(tmp_path, [line(wrong_key=True)], workers=2), [line(wrong_key=True)])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "wrong_columns",
            r"stage wrong_columns returned the columns \['letters'\], it declares \['letter'\]",
        ),
        ("undeclared", "stage undeclared drops a row for 'strange', a reason that it does not declare"),
    ],
)
def test_a_stage_that_breaks_its_own_declaration_is_a_bug(tmp_path, function, message):
    with pytest.raises(ConfigError, match=message):
        run_all(make_run(tmp_path, [line(function)]), [line(function)])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "stage nonsense returned a NoneType for 1 rows; it must be a list with one per row"),
        ("generator", "stage nonsense returned a generator for 1 rows"),
        ("short", "stage nonsense returned 0 results for 1 rows"),
        ("nothing", "stage nonsense: result 0 is a NoneType; it must be a mapping or a Drop"),
        ("tuples", "stage nonsense: result 0 is a tuple"),
        ("detail", "stage nonsense: result 0 is Drop.* reason and detail are text"),
        ("reason", "stage nonsense: result 0 is Drop.* reason and detail are text"),
        ("id", "stage nonsense: result 0 is Drop.* id too or None"),
        ("size", "stage nonsense: result 0 is Drop.* width_px and height_px are whole numbers above 0"),
        ("float", "stage nonsense: column whole: 1.5 is no whole number"),
        ("text", "stage nonsense: column whole: 'one' is no whole number"),
        ("large", r"stage nonsense: column whole \(int64\): "),
    ],
)
def test_nonsense_from_a_stage_is_one_error_that_names_it(tmp_path, kind, message):
    lines = [line("nonsense", kind=kind)]
    with pytest.raises(ConfigError, match=message):
        run_all(make_run(tmp_path, lines), lines)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("reason", "careless, part-0: drops rows for 'strange', a reason that it does not declare"),
        ("no reason", "careless, part-0: drops: 1 rows without reason"),
        ("no detail", "careless, part-0: drops: 1 rows without detail"),
        (
            "foreign",
            "careless, part-0: drops: position 4711 is not that of a row which reached the stage",
        ),
        (
            "foreign change",
            "careless, part-0: changes: position -1 is not that of a row which reached the stage",
        ),
        ("falling", "careless, part-0: changes: position 1 comes after 2; they must ascend"),
        ("twice", "careless, part-0: drops: position 1 comes after 1; they must ascend, each of them once"),
        (
            "column",
            r"careless, part-0: changes: has the columns \['hole', 'position'\], not \['position', 'whole'\]",
        ),
        ("no column", r"careless, part-0: drops: has the columns \['position', 'reason'\], not"),
        ("text", "careless, part-0: changes: Failed to parse string: 'one'"),
        ("fraction", "careless, part-0: changes: Float value 1.500000 was truncated"),
        ("tuple", "careless, part-0: it yielded a tuple; it must be an Update of two tables"),
        ("rows", "careless, part-0: it yielded a Update; it must be an Update of two tables"),
        ("none", "careless, part-0: it yielded a NoneType; it must be an Update of two tables"),
        ("few", "careless yielded 1 updates for 2 parts; it must be one per part"),
        ("many", r"careless yielded more than one update per part \(2 parts\)"),
        (
            "nothing",
            "careless: TypeError: it returned a NoneType; it must yield one Update per part$",
        ),
        ("raises", r"careless: ValueError: no idea \(toy_stages.py:\d+\)$"),
        ("exit", r"careless: SystemExit: 3 \(toy_stages.py:\d+\)$"),
    ],
)
def test_nonsense_from_a_corpus_stage_is_one_error_that_names_it(tmp_path, kind, message):
    lines = [line("careless", kind=kind)]
    run = make_run(tmp_path, lines, parts={"part-0": [1, 2, 3], "part-1": [4, 5, 6]})
    with pytest.raises(ConfigError, match=f"^stage {message}"):
        run_all(run, lines)
    assert run.store.record(1, "part-1") is None


def test_a_corpus_stage_that_keeps_its_promise_passes(tmp_path):
    lines = [line("careless")]
    run = make_run(tmp_path, lines, parts={"part-0": [1, 2, 3], "part-1": [4, 5, 6]})
    (records,) = run_all(run, lines)
    assert [r.counts["rejected"] for r in records] == [{"odd": 1}, {"odd": 1}]
    assert column(run, 1, "whole") == [7, None, 7, None]


def test_a_bug_in_a_built_in_corpus_stage_keeps_its_traceback(tmp_path, monkeypatch):
    stage, _ = line("careless", kind="raises").load()
    monkeypatch.setattr(stage.function, "__module__", corpus_stages.__name__)
    run = make_run(tmp_path, [line("careless", kind="raises")])
    with pytest.raises(ValueError, match="no\nidea") as caught:
        run_all(run, [line("careless", kind="raises")])
    assert caught.value.__notes__ == ["in stage careless"]


def test_a_task_of_a_corpus_stage_that_ends_its_process_is_lost_alone(tmp_path):
    """Those in flight beside it are run again, and the results stay in order."""
    lines = [line("squares", poison=(3, 6))]
    run = make_run(tmp_path, lines, workers=2)
    (records,) = run_all(run, lines)
    assert [r.counts["quarantined"] for r in records] == [{}, {}, {"process_crash": 1}, {"process_crash": 2}]
    kept = [v for values in PARTS.values() for v in values if v not in (3, 6)]
    assert column(run, 1, "value") == kept
    assert column(run, 1, "square") == [v * v for v in kept]
    dropped = run.store.dropped(1, "part-3").to_pylist()
    assert [(d["item"], d["verdict"], d["detail"], d["retry"]) for d in dropped] == [
        ("part-3/4", "quarantined", "the process ended", True),
        ("part-3/7", "quarantined", "the process ended", True),
    ]


def test_a_corpus_stage_that_cannot_lose_a_task_says_so(tmp_path):
    lines = [line("squares", poison=(1,), lost_too=False)]
    message = "stage squares: 1 of its 4 tasks ended their process, also when run alone .*enough memory"
    with pytest.raises(DataError, match=message):
        run_all(make_run(tmp_path, lines, workers=2), lines)


def test_more_than_a_few_lost_tasks_stop_a_corpus_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_stages, "_MAX_KILLERS", 1)
    lines = [line("squares", poison=(0, 1, 2))]
    with pytest.raises(DataError, match="stage squares: 2 of its 4 tasks ended their process"):
        run_all(make_run(tmp_path, lines, workers=2), lines)


def test_retrying_a_corpus_stage_makes_all_its_parts_again(tmp_path):
    away = tmp_path / "away"
    away.touch()
    lines = [line("squares", poison=(3,), away=str(away))]
    parts = {"part-0": [1, 2], "part-1": [3]}
    (first,) = run_all(make_run(tmp_path / "work", lines, workers=2, parts=parts), lines)
    assert [r.retry for r in first] == [0, 1]
    away.unlink()
    (plain,) = run_all(make_run(tmp_path / "work", lines, parts=parts), lines)
    assert plain == first  # without being asked nothing is tried again
    run = make_run(tmp_path / "work", lines, parts=parts, retry=True)
    (again,) = run_all(run, lines)
    assert [(r.retry, r.counts["kept"]) for r in again] == [(0, 2), (0, 1)]
    assert column(run, 1, "square") == [1, 4, 9]


def test_a_stage_that_calls_exit_costs_the_row(tmp_path):
    lines = [line("nonsense", kind="exit")]
    run = make_run(tmp_path, lines)
    (records,) = run_all(run, lines)
    assert [r.counts["quarantined"] for r in records] == [{"nonsense_failed": len(v)} for v in PARTS.values()]
    assert run.store.dropped(1, "part-0")["detail"].to_pylist() == ["SystemExit: 3"]


def test_a_record_that_was_changed_is_noticed(tmp_path):
    run_all(make_run(tmp_path, [line()]), [line()])
    path = tmp_path / "01-double" / "part-2" / "_SUCCESS.json"
    path.write_text(path.read_text().replace('"kept": 6', '"kept": 7'))
    with pytest.raises(DataError, match=r"part-2/_SUCCESS.json: damaged \(wrong checksum\)"):
        run_all(make_run(tmp_path, [line()]), [line()])


def test_a_change_in_a_package_that_a_stage_relies_on_changes_its_version(tmp_path, monkeypatch):
    package = tmp_path / "relied_on"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import relied_on

    stage, settings = line().load()
    stage = dataclasses.replace(stage, modules=(relied_on,))
    first = stage.version(settings)
    assert stage.version(settings) == first
    _source.cache_clear()
    (package / "part.py").write_text("A = 2\n")
    assert stage.version(settings) != first


def test_damaged_tables_are_named(tmp_path):
    lines = [line(), line("ranks")]
    run_all(make_run(tmp_path, lines), lines)
    path = tmp_path / "01-double" / "part-3" / "rows.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(bytes(data))
    (tmp_path / "02-ranks" / "part-3" / "_SUCCESS.json").unlink()
    with pytest.raises(
        DataError, match=r"01-double/part-3/rows.parquet: damaged .* remove .*part-3 and run again"
    ):
        run_all(make_run(tmp_path, lines), lines)
    record = tmp_path / "01-double" / "part-1" / "_SUCCESS.json"
    record.write_text("{")
    with pytest.raises(DataError, match=r"part-1/_SUCCESS.json: damaged"):
        run_all(make_run(tmp_path, lines), lines)


def test_gather_reads_chosen_rows_across_parts(tmp_path):
    run = make_run(tmp_path, [line()])
    run_all(run, [line()])
    corpus = tables.Corpus(run.store, 1, run.parts, tmp_path, run.source, lambda f, t: map(f, t))
    values = column(run, 1, "value")
    rows = np.array([0, 2, 3, 8, 9, 17])
    assert corpus.starts().tolist() == [0, 0, 3, 9, 18]
    assert corpus.gather(rows, ["value"])["value"].to_pylist() == [values[r] for r in rows]
    assert corpus.gather(rows[:0], ["value"]).num_rows == 0
