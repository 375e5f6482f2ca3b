"""Tables that name image files: what a row becomes, and that nothing is lost or read twice."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import random

import numpy as np
import pyarrow as pa
import pytest

from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation.captions import parse_given, parse_sidecars
from megatron_nucleus.data.curation.readers import rows
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.image_tables import IMAGES, as_csv, listed, make_table, put, write_parquet


@pytest.mark.parametrize("kind", ["csv", "csv with BOM and CR LF", "tsv", "jsonl", "parquet"])
def test_a_row_is_an_item_with_what_the_table_says(tmp_path, kind):
    put(tmp_path, IMAGES)
    make_table(tmp_path, kind)
    name = f"list.{kind.split()[0]}"
    assert listed(tmp_path) == {
        "c.png": ("c.png", None, []),
        f"{name}#1/photos/a.jpg": (
            "photos/a.jpg",
            {"caption": "a dog", "source_url": "http://e/1", "licence": "MIT", "attribution": "A", "year": "1999"},
            [],
        ),
        f"{name}#2/photos/b.jpg": ("photos/b.jpg", {"caption": 'says "no", loudly\nagain'}, []),
        f"{name}#3/photos/a.jpg": ("photos/a.jpg", {"caption": "the same dog", "year": "2000"}, []),
    }  # fmt: skip
    scan = readers.scan(tmp_path)
    assert (scan.files, scan.tables, scan.rows, scan.ignored, scan.warnings) == (1, 1, 3, 0, ())
    assert [t.name for t in scan.tasks] == ["files-000000", "table-000000"]
    assert readers.describe(scan.tasks[1]) == f"{name} rows 1 to 3"
    side = parse_given(readers.list_part(scan.tasks[1])["given"][0].as_py())
    assert (side.captions[0].text, side.captions[0].source) == ("a dog", "table")
    assert (side.licence, side.source_url, side.attribution) == ("MIT", "http://e/1", "A")
    assert side.metadata == {"year": "1999"}


def test_caption_files_beside_a_named_image_are_read_too(tmp_path):
    put(
        tmp_path,
        IMAGES
        | {"photos/a.txt": "t", "photos/a.json": '{"license": "MIT"}', "photos/b.TXT": "u", "x.txt": "o"},
    )
    put(tmp_path, {"meta/list.csv": "file,alt\n../photos/a.jpg,a dog\n../photos/b.jpg,\n"})
    found = listed(tmp_path)
    name = "meta/list.csv#1/../photos/a.jpg"
    assert found[name] == ("photos/a.jpg", {"caption": "a dog"}, ["photos/a.json", "photos/a.txt"])
    assert found["meta/list.csv#2/../photos/b.jpg"] == ("photos/b.jpg", {}, ["photos/b.TXT"])
    scan = readers.scan(tmp_path)
    assert (scan.files, scan.ignored, scan.captions_without_image) == (1, 0, 1)
    files = [(p, (tmp_path / p).read_bytes()) for p in found[name][2]]
    side = parse_sidecars(files, json.dumps(found[name][1]))
    assert [c.text for c in side.captions] == ["a dog", "t"]
    assert side.licence == "MIT"


def test_paths_are_of_the_tables_folder_else_of_the_input_and_never_lead_out(tmp_path):
    root = tmp_path / "in"
    put(root, {"sub/a.jpg": b"1", "a.jpg": b"2", "b.jpg": b"3", "ä.jpg": b"4"})
    put(tmp_path, {"outside.jpg": b"X", "in2/x.jpg": b"X"})
    cells = [
        "a.jpg", "b.jpg", "../b.jpg", "./sub/../../a.jpg", str(root / "b.jpg"), "ä.jpg",
        "../../outside.jpg", str(tmp_path / "outside.jpg"), "/etc/passwd",
        str(tmp_path / "in2/x.jpg"), "../../in2/x.jpg",
        "gone.jpg", "http://e.org/a.jpg", "a.jpg/x", "..", "", "n" * 5000 + ".jpg",
    ]  # fmt: skip
    put(
        root, {"sub/list.jsonl": "".join(json.dumps({"path": c, "n": i}) + "\n" for i, c in enumerate(cells))}
    )
    places = [value[0] for name, value in listed(root).items() if "#" in name]
    expected = ["sub/a.jpg", "b.jpg", "b.jpg", "a.jpg", "b.jpg", "ä.jpg"]
    assert places[: len(expected)] == expected
    reasons = [place["reason"] for place in places[len(expected) :]]
    assert reasons == [*["unsafe_path"] * 5, *["missing_file"] * 3, "unsafe_path", "bad_row", "missing_file"]
    assert "download the images" in places[12]["detail"]
    for task in readers.scan(root).tasks:  # nothing that is reported leads out either
        for item in readers.task_items(task):
            assert not os.path.relpath(
                os.path.join(os.fsencode(root), item.reference.path), os.fsencode(root)
            ).startswith(b"..")
            assert item.problem is None or item.problem[0] in readers.READ_REASONS


def test_rows_that_cannot_be_read_cost_themselves_alone(tmp_path):
    put(tmp_path, {f"{i}.jpg": b"x" for i in range(9)})
    lines = [
        b"path,caption",
        b"0.jpg,fine",
        b"1.jpg,one,field too many",
        b"2.jpg",
        b'3.jpg,"never closed',
        b"4.jpg,caf\xe9",
        b"",
        b'5.jpg,"closed" badly',
        b"6.jpg,carriage\rreturn",
        b'7.jpg,a 5" pipe and ""',
        b"8.jpg," + b"w" * (rows.MAX_ROW_BYTES),
        b'"0.jpg","over',
        b'two lines"',
    ]
    put(tmp_path, {"list.csv": b"\n".join(lines)})
    found = {name.split("/")[0]: value for name, value in listed(tmp_path).items() if "#" in name}
    problems = {name: value[0]["detail"] for name, value in found.items() if isinstance(value[0], dict)}
    assert {value[0]["reason"] for value in found.values() if isinstance(value[0], dict)} == {"bad_row"}
    assert [n for n in problems if n != "list.csv"] == [f"list.csv#{i}" for i in (2, 3, 4, 5, 6, 7, 9)]
    words = ("3 fields", "1 fields", "not a CSV row", "not UTF-8", "not a CSV row", "carriage", "longer than")
    for word, detail in zip(words, problems.values(), strict=True):
        assert word in detail
    good = {name: value[1] for name, value in found.items() if name not in problems}
    assert good == {
        "list.csv#1": {"caption": "fine"},
        "list.csv#8": {"caption": 'a 5" pipe and ""'},
        "list.csv#10": {"caption": "over\ntwo lines"},
    }
    table = next(t for t in readers.scan(tmp_path).tasks if t.table)
    bad = next(i for i in readers.task_items(table) if i.name == "list.csv#5")
    assert (
        readers.read_reference(str(tmp_path), bad.reference, 99) == b"4.jpg,caf\xe9\n"
    )  # the bytes of the row


def test_csv_rows_equal_those_of_the_csv_module_from_any_offset(tmp_path):
    rng = random.Random(5)
    pieces = ["a", 'quote " in', '"', ",", "\n", "\r\n", "ä", " ", "\t", "''", "word"]
    wanted = [["".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(3)] for _ in range(400)]
    for row in wanted:
        row[0] += "x"  # no row is blank
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(wanted)
    data = text.getvalue().encode()
    found = list(rows.text_rows(io.BytesIO(data), "csv"))
    assert [row.value for row in found] == wanted
    for start in (1, 57, 399):
        again = list(rows.text_rows(io.BytesIO(data), "csv", found[start].offset))
        assert again == found[start:]
    assert b"".join(data[r.offset : r.offset + r.length] for r in found) == data


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_parts_of_any_size_list_the_same_rows(tmp_path, monkeypatch, kind):
    put(tmp_path, {f"i/{n}.jpg": b"x" for n in range(0, 40, 2)})
    columns = {"path": [f"i/{n}.jpg" for n in range(40)], "text": [f"line\n{n}" for n in range(40)]}
    table = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "parquet":
        write_parquet(tmp_path / "t.parquet", columns, row_group_size=7)
    else:
        text = as_csv(table) if kind == "csv" else "".join(json.dumps(r) + "\n\n" for r in table)
        put(tmp_path, {f"t.{kind}": text})
    whole = listed(tmp_path)
    assert len(whole) == 40
    assert sum(isinstance(place, dict) for place, _, _ in whole.values()) == 20
    for size in (1, 6, 7, 39, 40):
        monkeypatch.setattr(readers, "ROWS_PER_TASK", size)
        tasks = readers.scan(tmp_path).tasks
        assert [t.name for t in tasks] == [f"table-{n:06d}" for n in range(-(-40 // size))]
        assert listed(tmp_path) == whole


@pytest.mark.parametrize("depth", [100, 700, 5000, 100_000])
def test_rows_nested_too_deep_cost_themselves_alone(tmp_path, depth):
    put(tmp_path, {"a.jpg": b"A"})
    deep = '{"path": "a.jpg", "x": ' + "[" * depth + "]" * depth + "}\n"
    put(tmp_path, {"list.jsonl": '\ufeff{"path": "a.jpg"}\n' + deep + '{"path": "a.jpg", "text": "t"}\n'})
    found = [value[0] for value in listed(tmp_path).values()]
    assert (found[0], found[2]) == ("a.jpg", "a.jpg")
    if depth != 700:  # near the limit it depends on the Python version
        assert (found[1] == "a.jpg") if depth == 100 else (found[1]["reason"] == "bad_row")


def test_several_captions_in_a_cell(tmp_path):
    put(tmp_path, {"a.jpg": b"A"})
    put(tmp_path, {"one.csv": 'path,captions\na.jpg,"[""a dog"", ""a pup""]"\na.jpg,[photo] of a dog\n'})
    captions = [["a dog", None, "a pup"], None, []]
    write_parquet(tmp_path / "two.parquet", {"path": ["a.jpg"] * 3, "captions": captions})
    structs = [{"text": "a dog", "source": "blip", "model": None}]
    write_parquet(tmp_path / "three.parquet", {"path": ["a.jpg"], "caption": ["alt"], "captions": [structs]})
    texts = {
        name: [(c.text, c.source) for c in parse_given(json.dumps(given)).captions]
        for name, (_, given, _) in listed(tmp_path).items()
    }
    assert texts == {
        "one.csv#1/a.jpg": [("a dog", "table"), ("a pup", "table")],
        "one.csv#2/a.jpg": [("[photo] of a dog", "table")],
        "two.parquet#1/a.jpg": [("a dog", "table"), ("a pup", "table")],
        "two.parquet#2/a.jpg": [],
        "two.parquet#3/a.jpg": [],
        "three.parquet#1/a.jpg": [("alt", "table"), ("a dog", "blip")],
    }


def test_parquet_values_of_every_kind_become_metadata(tmp_path):
    put(tmp_path, {"a.jpg": b"A"})
    time = datetime.datetime(2020, 1, 2, 3, 4, 5)
    columns = {
        "path": pa.array(["a.jpg"]).dictionary_encode(),
        "n": [5],
        "ok": [True],
        "nan": [float("nan")],
        "inf": [float("inf")],
        "time_ns": pa.array([time], pa.timestamp("ns")).cast(pa.int64()).cast(pa.timestamp("ns")),
        "odd_ns": pa.array([1], pa.timestamp("ns")),
        "day": [time.date()],
        "wait": pa.array([7], pa.duration("ns")),
        "tags": [["x", None]],
        "box": [{"left": 1.5}],
        "bytes": [b"\xff"],
        "embedding": pa.array([b"\xff\xfe"], pa.binary(2)),
    }
    write_parquet(tmp_path / "t.parquet", columns)
    ((_, given, _),) = listed(tmp_path).values()
    assert given == {
        "n": 5,
        "ok": True,
        "inf": "inf",
        "time_ns": "2020-01-02 03:04:05.000000000",
        "odd_ns": "1970-01-01 00:00:00.000000001",
        "day": "2020-01-02",
        "wait": 7,
        "tags": ["x", None],
        "box": {"left": 1.5},
    }


def test_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path):
    put(tmp_path, {"a.jpg": b"A"})
    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    write_parquet(tmp_path / "t.parquet", {"path": ["a.jpg"] * 3, "text": texts})
    found = listed(tmp_path)
    assert list(found) == ["t.parquet#1/a.jpg", "t.parquet#2", "t.parquet#3/a.jpg"]
    assert found["t.parquet#2"][0]["reason"] == "bad_row"
    assert [given and given["caption"] for _, given, _ in found.values()] == ["one", None, "three"]


def test_damaged_tables_are_one_item_and_the_rest_goes_on(tmp_path):
    put(tmp_path, {f"{i}.jpg": b"x" for i in range(300)})
    put(
        tmp_path,
        {
            "utf16.csv": "path,text\n0.jpg,x\n".encode("utf-16"),
            "junk.parquet": b"PAR1 no",
            "log.jsonl": "no\n[1]\n",
        },
    )
    names = [f"{i}.jpg" for i in range(300)]
    noise = np.random.default_rng(0).integers(0, 1 << 62, 300)
    options = {
        "row_group_size": 100,
        "compression": "none",
        "use_dictionary": False,
        "write_page_checksum": True,
    }
    write_parquet(tmp_path / "rot.parquet", {"path": names, "noise": noise}, **options)
    raw = bytearray((tmp_path / "rot.parquet").read_bytes())
    raw[raw.index(int(noise[150]).to_bytes(8, "little"))] ^= 1  # in the second row group
    (tmp_path / "rot.parquet").write_bytes(raw)
    found = listed(tmp_path)
    bad = {name: place for name, (place, _, _) in found.items() if isinstance(place, dict)}
    assert {place["reason"] for place in bad.values()} == {"damaged_table"}
    assert list(bad) == ["junk.parquet", "log.jsonl", "rot.parquet#101 (rest, to row 300)", "utf16.csv"]
    assert "not UTF-8" in bad["utf16.csv"]["detail"]
    assert sum(name.startswith("rot.parquet#") for name in found) == 101
    scan = readers.scan(tmp_path)
    assert (scan.tables, scan.files) == (4, 0)  # the names could be read, so no file is listed twice


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_mutated_tables_never_stop_the_reader(tmp_path, kind):
    """Every mutation gives items with declared problems, or an error that names the column; twice the same."""
    put(tmp_path, IMAGES)
    make_table(tmp_path, kind)
    path = tmp_path / f"list.{kind}"
    whole, rng = path.read_bytes(), random.Random(1)
    outcomes = set()
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :][: rng.randrange(1, 40)]
            else:
                data[rng.randrange(len(data))] = rng.choice((0, 10, 13, 34, 44, 123, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            first = listed(tmp_path)
        except ConfigError as error:
            outcomes.add(str(error).split(": ")[0])
            continue
        assert listed(tmp_path) == first
        reasons = {place["reason"] for place, _, _ in first.values() if isinstance(place, dict)}
        assert reasons <= readers.READ_REASONS
        outcomes |= reasons or {"none"}
    assert len(outcomes) >= 2
    assert outcomes <= readers.READ_REASONS | {"none", f"list.{kind}"}


def test_a_table_that_changes_after_the_scan_is_noticed(tmp_path):
    put(tmp_path, {"a.jpg": b"A", "t.csv": "path\na.jpg\na.jpg\n"})
    (task,) = readers.scan(tmp_path).tasks
    put(tmp_path, {"t.csv": "path\na.jpg\n"})
    items = readers.task_items(task)
    assert [i.problem and i.problem[0] for i in items] == [None, "damaged_table"]
    assert "1 of 2 rows" in items[1].problem[1]
