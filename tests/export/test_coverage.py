"""Finding what is missing from tensors that lie in pieces."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from megatron_nucleus.export.coverage import check_complete, read_layout
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.utils.errors import DataError


def write(path, pieces):
    """{name: (offsets, tensor)} as torch.distributed.checkpoint does; offsets None: a whole tensor, unmarked."""
    info = {name: {"saved_offsets": list(at)} for name, (at, _) in pieces.items() if at is not None}
    tensors = {name: tensor.contiguous() for name, (_, tensor) in pieces.items()}
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(info)} if info else None)
    return path


def boxes(folder, cut, shape=(8, 6)):
    """One file for each ((row, end), (column, end)) box of tensor x."""
    files = []
    for number, ((a, b), (c, d)) in enumerate(cut):
        piece = torch.zeros(b - a, d - c, *shape[2:])
        files.append(write(folder / f"{number}.safetensors", {"x": ((a, c), piece)}))
    return files


FULL = {"x": TensorInfo((8, 6), torch.float32)}


@pytest.mark.parametrize(
    "cut",
    [
        [((0, 8), (0, 6))],
        [((0, 3), (0, 6)), ((3, 8), (0, 6))],
        [((0, 8), (0, 2)), ((0, 8), (2, 6))],
        [((0, 4), (0, 3)), ((0, 4), (3, 6)), ((4, 8), (0, 5)), ((4, 8), (5, 6))],
        [((0, 5), (0, 2)), ((0, 3), (2, 6)), ((3, 8), (2, 6)), ((5, 8), (0, 2))],  # no common edge
        [((0, 8), (0, 6)), ((8, 8), (0, 6))],  # a rank that holds nothing
    ],
)
def test_every_way_to_tile_a_tensor_is_complete(tmp_path, cut):
    layout = read_layout(boxes(tmp_path, cut))
    assert layout["x"].info == FULL["x"]
    check_complete(layout, FULL)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ([((0, 3), (0, 6)), ((5, 8), (0, 6))], "tensor x has 8 rows; missing: rows 3-4"),
        ([((0, 7), (0, 6))], "tensor x has 8 rows; missing: row 7"),
        ([((2, 8), (0, 6))], "missing: rows 0-1"),
        ([((0, 8), (0, 2)), ((0, 5), (2, 6))], "missing: rows 5-7"),
        ([((0, 5), (0, 6)), ((4, 8), (0, 6))], "stored twice: row 4"),
        ([((0, 4), (0, 4)), ((0, 4), (3, 6)), ((4, 8), (0, 6))], "stored twice: rows 0-3"),
        # As many elements as the tensor has, but a hole and an overlap
        ([((0, 4), (0, 6)), ((2, 6), (0, 6))], "stored twice: rows 2-3; missing: rows 6-7"),
        ([((0, 9), (0, 6))], "outside of its shape: row 8"),
        ([((0, 8), (0, 7))], "outside of its shape: rows 0-7"),
    ],
)
def test_holes_and_overlaps_are_named_by_their_rows(tmp_path, cut, message):
    with pytest.raises(DataError, match=re.escape(message)):
        check_complete(read_layout(boxes(tmp_path, cut)), FULL)


def test_agrees_with_counting_elements_one_by_one(tmp_path):
    """Random boxes against an array of counters."""
    generator = random.Random(0)
    for _ in range(150):
        cut = []
        for _ in range(generator.randint(1, 5)):
            a, b = sorted(generator.sample(range(5), 2))
            c, d = sorted(generator.sample(range(4), 2))
            cut.append(((a, b), (c, d)))
        if generator.random() < 0.5:  # a cut of the whole, so that complete ones come up, too
            rows, columns = generator.randint(1, 3), generator.randint(1, 2)
            cut = list(itertools.product([(0, rows), (rows, 4)], [(0, columns), (columns, 3)]))
        count = torch.zeros(4, 3)
        for (a, b), (c, d) in cut:
            count[a:b, c:d] += 1
        layout = read_layout(boxes(tmp_path, cut))
        expected = {"x": TensorInfo((4, 3), torch.float32)}
        if bool((count == 1).all()):
            check_complete(layout, expected)
            continue
        with pytest.raises(DataError) as caught:
            check_complete(layout, expected)
        for what, bad in (("stored twice", count > 1), ("missing", (count == 0) & (count <= 1))):
            rows = set(bad.any(dim=1).nonzero().flatten().tolist())
            if what == "missing":  # an overlap in the same row is named instead
                rows -= set((count > 1).any(dim=1).nonzero().flatten().tolist())
            assert named_rows(str(caught.value), what) == rows, (cut, str(caught.value))


def named_rows(message, what):
    found = re.findall(rf"{what}: rows? (\d+)(?:-(\d+))?", message)
    return {row for low, high in found for row in range(int(low), int(high or low) + 1)}


def test_names_shapes_and_dtypes_are_compared(tmp_path):
    file = write(tmp_path / "a.safetensors", {"x": (None, torch.ones(2, 3)), "s": (None, torch.tensor(2.0))})
    scalar = {"s": TensorInfo((), torch.float32)}
    check_complete(read_layout([file]), {"x": TensorInfo((2, 3), torch.float32), **scalar})
    for expected, message in (
        (scalar, r"tensor x does not belong here \(.*a\.safetensors\)"),
        ({"x": TensorInfo((2, 3), torch.float16), **scalar}, r"x is \[2, 3\] torch.float32 .* torch.float16"),
        ({"x": TensorInfo((6,), torch.float32), **scalar}, r"x is \[2, 3\] .* expected: \[6\]"),
        ({"x": TensorInfo((2, 3), torch.float32), **scalar, "y": TensorInfo((4, 2), torch.float32)},
         r"tensor y has 4 rows; missing: all of them"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            check_complete(read_layout([file]), expected)


def test_damaged_or_contradicting_files_are_named(tmp_path):
    one = write(tmp_path / "1.safetensors", {"x": ((0, 0), torch.ones(2, 3))})
    for piece in (torch.ones(2, 3).half(), torch.ones(2)):
        two = write(tmp_path / "2.safetensors", {"x": ((2, 0)[: piece.dim()], piece)})
        with pytest.raises(DataError, match=r"2\.safetensors: tensor x contradicts"):
            read_layout([one, two])
    save_file({"x": torch.ones(2)}, two, {"DCP_SHARDING_INFO": "[1]"})
    with pytest.raises(DataError, match=r"2\.safetensors: damaged sharding information"):
        read_layout([two])
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"2\.safetensors: .*announces"):
        read_layout([two])
