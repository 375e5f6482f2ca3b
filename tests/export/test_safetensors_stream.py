"""Writing safetensors files slice by slice."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.safetensors_stream import SafetensorsStream, assign_shards, parse_size
from megatron_nucleus.utils.errors import ConfigError


def describe(tensors):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def mixed():
    torch.manual_seed(1)
    return {
        "odd": torch.randn(3, 1).bfloat16(),  # 6 bytes: what follows would be misaligned
        "wide": torch.randn(5, 3, dtype=torch.float64),
        "plain": torch.randn(4, 3),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(9).half(),
    }


def test_library_reads_what_was_streamed_in_slices(tmp_path):
    tensors = mixed()
    with SafetensorsStream(tmp_path, "model", describe(tensors), index_name="index.json") as stream:
        for name in stream.order:
            for row in tensors[name].split(2):
                stream.write(name, row)
    file = tmp_path / "model-00001-of-00001.safetensors"
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, entry in stream.files.items():
        content = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", file.name]


def test_shards_respect_the_limit_and_the_index_names_them(tmp_path):
    tensors = {f"t{i}": torch.full((i + 1, 10), float(i)) for i in range(8)}  # 40 .. 320 bytes
    with SafetensorsStream(tmp_path, "w", describe(tensors), 300, index_name="index.json") as stream:
        for name in stream.order:
            stream.write(name, tensors[name])
    weight_map = json.loads((tmp_path / "index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    sizes = {}
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
        sizes.setdefault(file, []).append(tensors[name].numel() * 4)
    assert all(sum(s) <= 300 or len(s) == 1 for s in sizes.values())
    assert len(sizes) == 6  # 40+80+120, 160, 200, 240, 280, 320
    assert set(stream.files) == {*sizes, "index.json"}


def test_order_of_shards_is_that_of_the_entries():
    entries = {f"t{i}": TensorInfo((10,), torch.float32) for i in range(5)}
    assert assign_shards(entries, 80) == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert assign_shards(entries, 1) == [["t0"], ["t1"], ["t2"], ["t3"], ["t4"]]


def test_mistakes_leave_no_file_with_its_final_name(tmp_path):
    entries = describe({"a": torch.ones(4), "b": torch.ones(2)})
    stream = SafetensorsStream(tmp_path, "m", entries)
    stream.write("a", torch.ones(3))
    with pytest.raises(ValueError, match="4 bytes were never written"):
        stream.close()
    with pytest.raises(ValueError, match="8 bytes where 4 are missing"):
        stream.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="expected"):
        stream.write("b", torch.ones(1))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        stream.write("a", torch.ones(1, dtype=torch.float64))
    stream.__exit__(ValueError, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 KB", 1500),
        ("77", 77),
        (12, 12),
        ("3B", 3),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "GB", "5TBB", "nan", "inf", "5 apples"])
def test_bad_sizes(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
