"""Tables that name image files: which files are tables, and which of their columns say what."""

from __future__ import annotations

import json

import pytest

from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.curation.captions import parse_given, parse_sidecars
from megatron_nucleus.data.curation.readers import ReadersConfig
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.image_tables import as_csv, listed, put, write_parquet


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
