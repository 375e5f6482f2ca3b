"""Looking into a data set: counts, checks of index against shards, samples by id, by words and by chance."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter

import pyarrow as pa
import pytest

from megatron_nucleus.data.shard_lookup import OTHERS, DataSet, _add, extract, plain
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import SIZES, make_encoded
from tests.data.lookup_sets import make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lookup") / "set"
    return folder, make(folder)


def test_counts(made):
    folder, rows = made
    counts = DataSet(folder).counts()
    assert counts["samples"] == 30
    assert counts["aspect_bucket"] == {"1024x1024": 15, "1344x768": 15}
    assert counts["tier"] == {"A1": 10, "A2": 10, "none": 10}
    assert counts["episode_bucket"] == {"B3": 22, "none": 8}
    assert counts["licence"] == {"CC0-1.0": 10, "MIT": 10, "none": 10}
    assert counts["caption_lengths"] == {"short": 36}
    assert counts["caption_sources"] == {
        name: sum(c["source"] == name for r in rows for c in r["captions"]) for name in ("web", "user")
    }
    assert (counts["captions"], counts["scores"], counts["clusters"], counts["copies"]) == (
        36,
        {"s": 15},
        2,
        2,
    )


def test_different_names_are_bounded():
    counter = Counter()
    _add(counter, pa.array([str(n) for n in range(10_050)] + ["7"]))
    assert counter[OTHERS] == 50
    assert counter["7"] == 2


def test_every_row_is_checked_against_its_shard(made, tmp_path):
    folder = made[0]
    seen = []
    assert DataSet(folder).check_members(lambda done, total: seen.append((done, total))) == 30
    assert seen == [(30, 30)]
    broken = shutil.copytree(folder, tmp_path / "broken")
    data = DataSet(broken)
    (victim,) = (r for batch in data.batches() for r in batch.to_pylist() if r["source_id"] == "in/11.png")
    with open(broken / victim["tar"], "r+b") as file:  # another name in the header of that one member
        file.seek(victim["offset"] - 512)
        file.write(b"0" * 8)
    with pytest.raises(DataError, match=f"{victim['tar']}: the index says that sample {victim['id']} of"):
        DataSet(broken).check_members()
    (broken / victim["tar"]).unlink()
    with pytest.raises(DataError, match=f"{victim['tar']}: cannot be read"):
        DataSet(broken).check_members()


def test_an_index_of_another_size_is_noticed(made, tmp_path):
    other = shutil.copytree(made[0], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "samples": 31}))
    with pytest.raises(DataError, match="the index has 30 rows, the manifest says 31"):
        DataSet(other).check_members()


def test_checksums_name_the_damaged_files(made, tmp_path):
    folder = made[0]
    files = [*(folder / "shards").glob("*.tar"), *(folder / "index").glob("*")]
    assert DataSet(folder).verify() == sum(f.stat().st_size for f in files)
    broken = shutil.copytree(folder, tmp_path / "broken")
    tars = sorted((broken / "shards").glob("*.tar"))
    assert len(tars) > 3
    data = bytearray(tars[1].read_bytes())
    data[1000] ^= 1  # the payload of a sample: the index still points at it
    tars[1].write_bytes(bytes(data))
    tars[2].unlink()
    with pytest.raises(DataError) as error:
        DataSet(broken).verify()
    assert f"shards/{tars[1].name} is not what the manifest says (SHA-256)" in str(error.value)
    assert f"shards/{tars[2].name} is missing" in str(error.value)
    assert tars[0].name not in str(error.value)


def test_by_id(made):
    folder, rows = made
    data = DataSet(folder)
    wanted = rows[17]
    found, number = data.by_id(wanted["id"][:12].upper(), 10)
    assert (number, found[0]["id"], found[0]["captions"][0]["text"]) == (
        1,
        wanted["id"],
        "a green house number 17",
    )
    first = {r["id"][0] for r in rows}
    for digit in first:
        found, number = data.by_id(digit, 2)
        assert number == sum(r["id"].startswith(digit) for r in rows)
        assert len(found) == min(2, number)
    unknown = wanted["id"][:9] + ("0" if wanted["id"][9] != "0" else "1") + "ff"
    assert data.by_id(unknown, 10) == ([], 0)
    assert data.nearest_id(unknown) == wanted["id"]
    assert data.nearest_id("xyz") == ""
    for search in (data.by_id, data.not_kept):
        with pytest.raises(ConfigError, match="beginning of an id"):
            search(" ", 10)


@pytest.mark.parametrize("wanted", ["in/17.png", "17.png", "/17.png"])
def test_by_the_path_in_the_input(made, wanted):
    folder, rows = made
    found, number = DataSet(folder).by_id(wanted, 10)
    assert (number, [row["id"] for row in found]) == (1, [rows[17]["id"]])
    assert DataSet(folder).by_id("7.png", 10)[1] == 1  # in/7.png, and neither in/17.png nor in/27.png


def test_what_was_not_kept_is_found_with_its_reason(made):
    data = DataSet(made[0])
    rows, number = data.not_kept("FFFF", 10)
    assert (number, [(r["item"], r["reason"]) for r in rows]) == (1, [("gone.png", "blurry")])
    assert data.not_kept("0123456789", 10) == ([], 0)
    (row,), number = data.not_kept("cut.png", 10)  # its content was never read
    assert (number, row["reason"], row["sha256"]) == (1, "undecodable", None)
    assert data.not_kept("cut.png", 0) == ([], 1)


def test_by_text(made):
    data = DataSet(made[0])
    found, number = data.by_text(["HOUSE", "red"], 3)
    assert number == 6
    assert sorted(r["source_id"] for r in data.by_text(["HOUSE", "red"], 10)[0]) == sorted(
        f"in/{n}.png" for n in range(0, 30, 5)
    )
    assert len(found) == 3
    assert data.by_text(["red", "sea"], 9) == ([], 0)  # in two captions of one image
    assert data.by_text(["100 %"], 9)[1] == 6
    assert data.by_text(["."], 9)[1] == 0  # no pattern
    for words in (["a", " "], []):
        with pytest.raises(ConfigError, match="--text: no word"):
            data.by_text(words, 9)


def test_a_draw_depends_on_the_seed_and_the_ids_alone(made, tmp_path):
    folder, rows = made
    data = DataSet(folder)
    first = [r["id"] for r in data.draw(8, 0)]
    assert len(set(first)) == 8
    assert [r["id"] for r in data.draw(8, 0)] == first
    assert [r["id"] for r in data.draw(4, 0)] == first[:4]
    assert {r["id"] for r in data.draw(8, 1)} != set(first)
    assert {r["id"] for r in data.draw(99, 3)} == {r["id"] for r in rows}
    chosen = data.draw(99, 0, "1344x768", "A1", "B3")
    want = [
        r for r in rows if (r["aspect_bucket"], r["tier"], r["episode_bucket"]) == ("1344x768", "A1", "B3")
    ]
    assert {r["id"] for r in chosen} == {r["id"] for r in want}
    for arguments, message in (
        (("1344x786",), "--bucket 1344x786: unknown .*1344x768"),
        ((None, "A9"), "--tier A9: unknown"),
        ((None, None, "B0"), "--episode B0: unknown"),
        ((None, "A5"), "--tier A5: .* has no such sample"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.draw(3, 0, *arguments)


def test_samples_pictures_and_extraction(made, tmp_path):
    folder, rows = made
    data = DataSet(folder)
    (row,), _ = data.by_id(rows[4]["id"], 1)
    (sample,) = data.samples([row])
    with tarfile.open(folder / row["tar"]) as tar:
        payload = tar.extractfile(f"{row['id']}.png").read()
    assert sample.payload == payload
    assert sample.info["n"] == 4
    assert data.picture(sample, 64).size == SIZES["1024x1024"]
    written = extract(sample, tmp_path / "out")
    assert [p.name for p in written] == [f"{row['id']}.png", f"{row['id']}.json"]
    assert written[0].read_bytes() == payload
    assert json.loads(written[1].read_text()) == sample.info
    assert extract(sample, tmp_path / "out") == written  # the same again changes nothing
    written[0].write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is there with other content"):
        extract(sample, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--extract .*\.png: .* is a file; name a new folder"):
        extract(sample, written[0])
    value = plain(row)
    assert (value["phash"], value["stage_versions"]) == ("0001020304050607", {"inspect": "abc"})
    json.dumps(value, allow_nan=False)


def test_encoded_data_has_counts_and_no_pictures(tmp_path):
    make_encoded(tmp_path / "encoded", 5)
    data = DataSet(tmp_path / "encoded")
    assert data.encoded
    assert data.counts()["samples"] == data.check_members() == 5
    assert data.counts()["captions"] == 0  # that writer puts them beside the latents alone
    (row,), _ = data.by_id(f"{3:064x}", 1)
    (sample,) = data.samples([row])
    assert sample.name == f"{3:064x}.safetensors"
    with pytest.raises(ConfigError, match="an encoded data set holds latents and no pictures"):
        data.picture(sample, 64)


def test_no_data_set(made, tmp_path):
    for path, message in (
        (tmp_path, "holds no manifest.json; give a data set folder"),
        (made[0] / "manifest.json", "manifest.json: a file, not a data set folder; give a data set folder"),
        (next((made[0] / "shards").glob("*.tar")), r"\.tar: a file, not a data set folder"),
        (tmp_path / "nowhere", "nowhere: no such folder"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            DataSet(path)
        assert "--data-path" not in str(error.value)
