"""Tables that name image files: which files are tables, what a row becomes, and that nothing is lost or read twice."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation.captions import parse_given, parse_sidecars
from megatron_nucleus.data.curation.readers import ReadersConfig, rows
from megatron_nucleus.utils.errors import ConfigError


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listed(root, config=None):
    """item name -> (path or problem, given or None, names of sidecars), in the order of parts."""
    out = {}
    for task in readers.scan(root, config).tasks:
        table = readers.list_part(pickle.loads(pickle.dumps(task)))
        assert table.schema == readers.LISTED_SCHEMA
        for row in table.to_pylist():
            assert row["item"] not in out
            place = row["problem"] or row["container"].decode()
            given = json.loads(row["given"]) if row["given"] else None
            out[row["item"]] = (place, given, [s["name"] for s in row["sidecars"]])
    return out


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


IMAGES = {"photos/a.jpg": b"A", "photos/b.jpg": b"B", "c.png": b"C"}
ROWS = [
    {"path": "photos/a.jpg", "caption": "a dog", "url": "http://e/1", "license": "MIT", "author": "A", "year": "1999"},
    {"path": "photos/b.jpg", "caption": 'says "no", loudly\nagain', "url": "", "license": "", "author": "", "year": ""},
    {"path": "photos/a.jpg", "caption": "the same dog", "url": "", "license": "", "author": "", "year": "2000"},
]  # fmt: skip


def as_csv(rows, delimiter=",", line_end="\n"):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def make_table(root, kind):
    if kind == "parquet":
        columns = {k: [row[k] or None for row in ROWS] for k in ROWS[0]}
        write_parquet(root / "list.parquet", columns, row_group_size=2)
    elif kind == "jsonl":
        put(root, {"list.jsonl": "".join(json.dumps({k: v for k, v in r.items() if v}) + "\n" for r in ROWS)})
    elif kind == "tsv":
        put(root, {"list.tsv": as_csv(ROWS, "\t")})
    elif kind == "csv with BOM and CR LF":
        put(root, {"list.csv": "\ufeff" + as_csv(ROWS, line_end="\r\n")})
    else:
        put(root, {"list.csv": as_csv(ROWS)})


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


def test_which_files_are_tables(tmp_path):
    put(tmp_path, {"a.jpg": b"A", "a.txt": "t"})
    put(
        tmp_path,
        {
            "empty.csv": "",
            "other.csv": "id,score\n1,2\n",
            "urls.csv": "url,width\nu,1\n",
            "none.csv": "path,text\n",
        },
    )
    write_parquet(tmp_path / "scores.parquet", {"id": [1], "score": [2.0]})
    scan = readers.scan(tmp_path)
    assert (scan.tables, scan.rows, scan.files, scan.ignored) == (1, 0, 1, 4)
    assert [w.split(":")[0] for w in scan.warnings] == [
        "empty.csv",
        "other.csv",
        "scores.parquet",
        "urls.csv",
    ]
    assert (
        scan.warnings[1] == "other.csv: no table of images, ignored (no column of image files; has id, score)"
    )
    assert list(listed(tmp_path)) == ["a.jpg"]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_captions_and_urls_without_files_are_an_error(tmp_path, suffix):
    put(tmp_path, {"a.jpg": b"A"})
    columns = {"URL": ["u"], "TEXT": ["t"], "similarity": ["0.3"]}
    if suffix == "parquet":
        write_parquet(tmp_path / "laion.parquet", columns)
    else:
        row = {k: v[0] for k, v in columns.items()}
        put(tmp_path, {f"laion.{suffix}": as_csv([row]) if suffix == "csv" else json.dumps(row)})
    with pytest.raises(
        ConfigError,
        match=rf"laion.{suffix}: missing column path; has URL, TEXT, similarity; .*--table-path-column",
    ):
        readers.scan(tmp_path)
    with pytest.raises(ConfigError, match="missing column where"):
        readers.scan(tmp_path, ReadersConfig(table_path_column="where"))


def test_columns_named_in_the_settings_are_the_only_ones_that_count(tmp_path):
    put(tmp_path, {"a.jpg": b"A"})
    head = "image,where,caption,blip,URL,origin,license,rights,by;who\n"
    put(tmp_path, {"list.csv": head + "zzz,a.jpg,alt text,a dog,u1,u2,?,CC0-1.0,Ann\n"})
    config = ReadersConfig("where", "blip", "origin", "rights", "by;who")
    ((place, given, _),) = listed(tmp_path, config).values()
    assert place == "a.jpg"
    side = parse_given(json.dumps(given))
    assert [c.text for c in side.captions] == ["a dog"]
    assert (side.source_url, side.licence, side.attribution) == ("u2", "CC0-1.0", "Ann")
    assert side.metadata == {
        "image": "zzz",
        "column_caption": "alt text",
        "column_URL": "u1",
        "column_license": "?",
    }
    with pytest.raises(
        ConfigError, match="list.csv: missing column nothing, set for caption; has image, where"
    ):
        readers.scan(tmp_path, ReadersConfig("where", "nothing"))
    put(tmp_path, {"list.csv": "path;text\na.jpg;a, dog\n"})
    ((place, given, _),) = [v for k, v in listed(tmp_path, ReadersConfig(table_separator=";")).items()]
    assert (place, given) == ("a.jpg", {"caption": "a, dog"})
    for wrong in ("", '"', "ab", "\n"):
        with pytest.raises(ConfigError, match="table_separator"):
            ReadersConfig(table_separator=wrong)


NAMED = {  # a column that no table has, as set -> the setting as the error names it
    "table_path_column": "--table-path-column wehre",
    "table_caption_column": "--table-caption-column wehre",
    "table_url_column": "--table-url-column wehre",
    "table_licence_column": "--table-licence-column wehre",
    "table_attribution_column": "--table-attribution-column wehre",
}


@pytest.mark.parametrize(("setting", "named"), list(NAMED.items()))
def test_a_named_column_that_no_table_has_is_an_error(tmp_path, setting, named):
    config = ReadersConfig(**{setting: "wehre"})
    put(tmp_path, {"a.jpg": b"A", "a.txt": "t"})
    with pytest.raises(
        ConfigError, match=f"{named}: no table .*; there is no file of the kinds csv, tsv, jsonl, p"
    ):
        readers.scan(tmp_path, config)
    put(tmp_path, {"one.csv": "where,blip\na.jpg,a dog\n", "two.tsv": "id\tscore\n1\t2\n"})
    with pytest.raises(
        ConfigError, match=f"{named}: no table .*one.csv: .* has where, blip; two.tsv: .* has id, sc"
    ):
        readers.scan(tmp_path, config)
    assert readers.scan(tmp_path).tables == 0  # without the setting they are other tables, named in warnings


def test_a_named_column_counts_where_some_table_has_it(tmp_path):
    """Other tables are left where they are; a damaged one may have the column, and is quarantined."""
    put(tmp_path, {"a.jpg": b"A", "list.csv": "where,text\na.jpg,a dog\n", "other.csv": "id,score\n1,2\n"})
    scan = readers.scan(tmp_path, ReadersConfig(table_path_column="where"))
    assert (scan.tables, scan.rows) == (1, 1)
    assert [w.split(":")[0] for w in scan.warnings] == ["other.csv"]
    put(tmp_path, {"list.csv": "where\n".encode("utf-16")})
    assert readers.scan(tmp_path, ReadersConfig(table_path_column="where")).tables == 1
    (tmp_path / "list.csv").unlink()
    write_parquet(tmp_path / "00000.parquet", {"key": ["0"], "status": ["success"], "caption": ["x"]})
    put(tmp_path, {"00000/0.jpg": b"B"})
    with pytest.raises(
        ConfigError, match="00000.parquet: img2dataset's record of a download; other.csv: no column"
    ):
        readers.scan(tmp_path, ReadersConfig(table_caption_column="caption"))


def test_headers_that_are_ambiguous_or_hold_no_paths(tmp_path):
    put(tmp_path, {"list.csv": "path,text,text\na.jpg,x,y\n"})
    with pytest.raises(ConfigError, match="list.csv: two columns named 'text'"):
        readers.scan(tmp_path)
    (tmp_path / "list.csv").unlink()
    write_parquet(tmp_path / "hf.parquet", {"image": [{"bytes": b"x", "path": "a.jpg"}], "text": ["t"]})
    with pytest.raises(ConfigError, match="hf.parquet: column image holds struct<.*not paths"):
        readers.scan(tmp_path)


def test_spaces_around_names_in_a_header_do_not_count(tmp_path):
    put(tmp_path, {"a.jpg": b"A", "list.csv": "path, Caption ,x\na.jpg, a dog ,1\n"})
    assert listed(tmp_path) == {"list.csv#1/a.jpg": ("a.jpg", {"caption": " a dog ", "x": "1"}, [])}


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


def test_img2datasets_files_output_is_a_folder_and_its_tables_are_records(tmp_path):
    side = {
        "caption": "a dog", "url": "http://e/1", "key": "000000000", "status": "success", "error_message": None,
        "width": 256, "height": 256, "sha256": "ab", "LICENSE": "CC0-1.0",
    }  # fmt: skip
    put(
        tmp_path,
        {
            "00000/000000000.jpg": b"A",
            "00000/000000000.txt": "a dog",
            "00000/000000000.json": json.dumps(side),
            "00000_stats.json": '{"count": 2}',
        },
    )
    columns = {
        "url": ["http://e/1", "u2"],
        "caption": ["a dog", "x"],
        "key": ["0", "1"],
        "status": ["success", "failed"],
    }
    write_parquet(tmp_path / "00000.parquet", columns)
    assert listed(tmp_path) == {
        "00000/000000000.jpg": (
            "00000/000000000.jpg",
            None,
            ["00000/000000000.json", "00000/000000000.txt"],
        )
    }
    scan = readers.scan(tmp_path)
    assert (scan.files, scan.ignored, scan.captions_without_image, scan.warnings) == (1, 2, 0, ())
    data = parse_sidecars([("k.json", json.dumps(side).encode()), ("k.txt", b"a dog")])
    assert [(c.text, c.source) for c in data.captions] == [("a dog", "json file")]
    assert (data.source_url, data.licence) == ("http://e/1", "CC0-1.0")
    assert "width" in data.metadata
    (tmp_path / "00000.parquet").rename(tmp_path / "list.parquet")  # elsewhere it is a list of URLs
    with pytest.raises(ConfigError, match="missing column path"):
        readers.scan(tmp_path)


def test_settings_are_part_of_the_stamp(tmp_path):
    put(tmp_path, {"a.jpg": b"A"})
    first, second = readers.scan(tmp_path), readers.scan(tmp_path, ReadersConfig(table_separator=";"))
    assert first.fingerprint == second.fingerprint
    assert first.tasks[0].stamp != second.tasks[0].stamp
    assert readers.scan(tmp_path).tasks[0].stamp == first.tasks[0].stamp
