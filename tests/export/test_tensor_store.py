"""Reading tensors from whole and from split safetensors files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.tensor_store import TensorStore, row_ranges
from megatron_nucleus.utils.errors import DataError


def split_file(path, pieces):
    """Write {name: (offsets, tensor)} as torch.distributed.checkpoint does."""
    info = {name: {"saved_offsets": list(offsets)} for name, (offsets, _) in pieces.items()}
    tensors = {name: tensor.contiguous() for name, (_, tensor) in pieces.items()}
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(info), "format": "pt"})


def test_reads_every_dtype_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "f64": torch.randn(3, 5, dtype=torch.float64),
        "f32": torch.randn(7, 2),
        "f16": torch.randn(4, 3).half(),
        "bf16": torch.randn(5, 3).bfloat16(),
        "i64": torch.arange(6),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    store = TensorStore([tmp_path / "a.safetensors"])
    assert sorted(store.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert store.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(store.read(name), tensor)
    assert torch.equal(store.read_rows("f32", 2, 5), tensors["f32"][2:5])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cut", ["rows", "columns", "grid"])
def test_assembles_pieces_and_agrees_with_torch(tmp_path, cut):
    full = torch.arange(6 * 8 * 3, dtype=torch.float32).reshape(6, 8, 3)
    boxes = {
        "rows": [(0, 2, 0, 8), (2, 6, 0, 8)],
        "columns": [(0, 6, 0, 5), (0, 6, 5, 8)],
        "grid": [(0, 4, 0, 3), (0, 4, 3, 8), (4, 6, 0, 3), (4, 6, 3, 8)],
    }[cut]
    for i, (a, b, c, d) in enumerate(boxes):
        whole = {"other": ((0,), torch.ones(2))} if i == 0 else {}
        split_file(tmp_path / f"shard-{i}.safetensors", {"x": ((a, c, 0), full[a:b, c:d]), **whole})
    store = TensorStore(sorted(tmp_path.glob("*.safetensors")))
    assert torch.equal(store.read("x"), full)
    for start in range(6):
        for stop in range(start + 1, 7):
            assert torch.equal(store.read_rows("x", start, stop), full[start:stop])

    import torch.distributed.checkpoint as dcp

    target = {"x": torch.zeros(6, 8, 3), "other": torch.zeros(2)}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(store.read("x"), target["x"])
    assert torch.equal(store.read("other"), target["other"])


def test_hole_overlap_and_contradiction_are_named(tmp_path):
    split_file(tmp_path / "a.safetensors", {"x": ((0, 0), torch.ones(2, 3))})
    split_file(tmp_path / "c.safetensors", {"x": ((4, 0), torch.ones(2, 3))})
    with pytest.raises(DataError, match=r"tensor x has .* missing: row"):
        TensorStore(tmp_path.glob("*.safetensors"))
    split_file(tmp_path / "c.safetensors", {"x": ((1, 0), torch.ones(2, 3))})
    with pytest.raises(DataError, match="tensor x has .* stored twice"):
        TensorStore(tmp_path.glob("*.safetensors"))
    split_file(tmp_path / "c.safetensors", {"x": ((2, 0), torch.ones(2, 3).half())})
    with pytest.raises(DataError, match=r"c\.safetensors: tensor x contradicts"):
        TensorStore(sorted(tmp_path.glob("*.safetensors")))


def test_damaged_files_are_named(tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({"x": torch.ones(100)}, good)
    data = good.read_bytes()
    cases = {
        "cut": data[:-7],
        "longer": data + b"x",
        "header_cut": data[:20],
        "empty": b"",
        "no_json": (8).to_bytes(8, "little") + b"notjson!",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "shape": data.replace(b'"shape":[100]', b'"shape":[101]'),
        "dtype": data.replace(b'"F32"', b'"F99"'),
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.safetensors"):
            TensorStore([path])
    with pytest.raises(DataError, match=r"gone\.safetensors: missing"):
        TensorStore([tmp_path / "gone.safetensors"])


def test_file_cut_after_opening_is_reported(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    store = TensorStore([path])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"a\.safetensors: ends before"):
        store.read("x")


def test_row_ranges_cover_once_and_respect_the_limit():
    info = TensorInfo((10, 4), torch.float32)
    assert list(row_ranges(info, 0, 10, 48)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_ranges(info, 5, 10, 1)) == [(5, 6), (6, 7), (7, 8), (8, 9), (9, 10)]
    assert list(row_ranges(info, 0, 10)) == [(0, 10)]
