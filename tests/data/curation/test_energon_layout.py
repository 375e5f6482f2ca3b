"""Our tars by the rules of Megatron-Energon, in an independent small reader.

`energon prepare` groups adjacent members into samples by name, refuses a key that the data set has twice, and writes
beside each tar an index of where its samples begin; samples and their parts are then read by byte position. The rules
here are those of its version 7 (prepare.py, itar.py and config.py of flavors/webdataset). Where Energon is installed,
it prepares and opens the same data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_nucleus.data import shards
from megatron_nucleus.data.index import INDEX_SCHEMA
from tests.data.curation.helpers import table

# The key is all up to the first dot of the file name, the part's name the rest; __names__ are not data.
KEY_AND_PART = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
NOT_DATA = re.compile(r"__[^/]*__($|/)")
BLOCK = 512


class Part(NamedTuple):
    """Where a part's bytes lie."""

    tar: str
    offset: int
    length: int


class Prepared(NamedTuple):
    """What a preparation knows. counts: samples by tar. parts: key -> part's name -> place."""

    counts: dict[str, int]
    parts: dict[str, dict[str, Part]]


def prepare(root: Path, into: Path) -> Prepared:
    """Index every tar below ``root``; the ``.tar.idx`` files go ``into`` another folder, in the same places.

    An index is the byte offsets at which samples begin, and the end of the last one, as unsigned 64-bit numbers.
    """
    counts, parts = {}, {}
    for path in sorted(root.rglob("*.tar")):
        name, starts, last = path.relative_to(root).as_posix(), [], None
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                match = KEY_AND_PART.match(member.name)
                assert member.isreg(), member.name
                assert match, member.name
                assert not NOT_DATA.match(member.name), member.name
                key, part = match.groups()
                if key != last:
                    assert key not in parts, f"{key} is there twice"
                    starts.append(member.offset)
                    parts[key], last = {}, key
                assert part not in parts[key], member.name
                parts[key][part] = Part(name, member.offset_data, member.size)
            starts.append(tar.offset)
        counts[name] = len(starts) - 1
        place = into / f"{name}.idx"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(struct.pack(f"<{len(starts)}Q", *starts))
    return Prepared(counts, parts)


def sample_at(path: Path, index: Path, number: int) -> dict[str, bytes]:
    """Part's name -> bytes of the sample with this number in a tar: its piece of the file, read as a tar."""
    begin, end = struct.unpack_from("<2Q", index.read_bytes(), 8 * number)
    with open(path, "rb") as file:
        file.seek(begin)
        piece = file.read(end - begin)
    with tarfile.open(fileobj=io.BytesIO(piece + bytes(2 * BLOCK)), mode="r:") as tar:
        return {KEY_AND_PART.match(member.name)[2]: tar.extractfile(member).read() for member in tar}


def field(sample: dict, access: str) -> object:
    """What an entry of a field map such as ``json[captions][0][text]`` names in a sample."""
    name, *inside = re.findall(r"[^[\]]+", access)
    value = json.loads(sample[name]) if name == "json" else sample[name]
    for step in inside:
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


@pytest.fixture(scope="module")
def prepared(curated, tmp_path_factory):
    into = tmp_path_factory.mktemp("nv_meta")
    return into, prepare(curated[1], into)


def test_every_sample_is_found_once_with_an_image_and_its_json(curated, prepared):
    _, output, result = curated
    _, (counts, parts) = prepared
    manifest = json.loads((output / "manifest.json").read_text())
    assert counts == {shard["tar"]: shard["samples"] for shard in manifest["shards"]}
    assert len(counts) > 2
    assert sum(counts.values()) == len(parts) == result["kept"]
    images = set()
    for own in parts.values():
        image, side = own  # in this order
        assert side == "json"
        images.add(image)
    assert images == {"jpg", "png", "webp", "gif", "tif"}


def test_bytes_by_position_are_the_originals_that_the_index_names(curated, prepared):
    source, output, _ = curated
    _, (_, parts) = prepared
    rows = table(output / "index", INDEX_SCHEMA)
    assert {row["id"] for row in rows} == parts.keys()
    for row in rows:
        (image, place), (_, side) = parts[row["id"]].items()
        assert place == (row["tar"], row["offset"], row["length"])
        with open(output / place.tar, "rb") as file:
            file.seek(place.offset)
            payload = file.read(place.length)
            file.seek(side.offset)
            info = json.loads(file.read(side.length))
        assert payload == (source / row["source_id"]).read_bytes()
        assert hashlib.sha256(payload).hexdigest() == row["id"] == info["id"]
        assert [caption["text"] for caption in info["captions"]] == [c["text"] for c in row["captions"]]
        assert image in (Path(row["source_id"]).suffix[1:], "jpg")  # by content: one is a JPEG called .png


def test_samples_by_number_through_the_tar_index(curated, prepared):
    _, output, _ = curated
    into, (counts, parts) = prepared
    keys = iter(parts)
    for name, count in counts.items():
        index = into / f"{name}.idx"
        assert index.stat().st_size == 8 * (count + 1)
        for number in range(count):
            sample, key = sample_at(output / name, index, number), next(keys)
            assert list(sample) == list(parts[key])
            assert field(sample, "json[id]") == key
            image = next(field(sample, part) for part in sample if part != "json")
            assert hashlib.sha256(image).hexdigest() == key
            text = field(sample, "json[captions][0][text]")
            assert text.startswith("a picture called ")
    assert next(keys, None) is None


def test_headers_are_plain_and_samples_fill_the_file(curated, prepared):
    """No extended headers before a member, which a reader by position would have to know of, and nothing between."""
    _, output, _ = curated
    into, (counts, _) = prepared
    for name in counts:
        data = (output / name).read_bytes()
        offsets = struct.unpack(f"<{counts[name] + 1}Q", (into / f"{name}.idx").read_bytes())
        assert offsets[0] == 0
        assert list(offsets) == sorted(set(offsets))
        assert data[offsets[-1] :] == bytes(2 * BLOCK)
        at = 0
        while at < offsets[-1]:
            header = data[at : at + BLOCK]
            assert header[257:265] == b"ustar\x0000"
            assert header[156:157] == b"0"  # a regular file
            at += BLOCK + shards.padded(int(header[124:135], 8))
        assert at == offsets[-1]


def test_energon_itself_prepares_and_opens_the_data_set(curated, prepared, tmp_path):
    energon = pytest.importorskip("megatron.energon", reason="needs pip install megatron-energon")
    from megatron.energon.tools.prepare import command

    root = shutil.copytree(curated[1], tmp_path / "set")
    words = ["--non-interactive", "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0"]
    command([*words, "--sample-type", "CrudeWebdataset", str(root)], standalone_mode=False)
    into, (counts, parts) = prepared
    assert json.loads((root / ".nv-meta" / ".info.json").read_text())["shard_counts"] == counts
    for name in counts:
        assert (root / f"{name}.idx").read_bytes() == (into / f"{name}.idx").read_bytes()

    class Raw(energon.TaskEncoder):
        """Samples as they lie in the tars."""

        decoder = None
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

    found = energon.get_train_dataset(
        str(root),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Raw(),
        repeat=False,
    )
    seen = {sample["__key__"]: sample for sample in energon.get_loader(found)}
    assert seen.keys() == parts.keys()
    for key, sample in seen.items():
        image = next(name for name in parts[key] if name != "json")
        assert hashlib.sha256(sample[image]).hexdigest() == key
        assert field(sample, "json[id]") == key
