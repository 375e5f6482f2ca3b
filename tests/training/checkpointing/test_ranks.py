"""Checkpoints of several ranks: any layout resumes from any other, and none counts that lacks a single row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_nucleus.export import native
from megatron_nucleus.export.coverage import read_layout
from megatron_nucleus.export.tensor_store import TensorStore
from megatron_nucleus.training.checkpointing import checkpointer
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.utils.errors import DataError
from tests.ranks import run_ranks
from tests.training.checkpointing.sharded_state import (
    EXTRA,
    SHAPES,
    assert_holds,
    build,
    fill,
    full_values,
    grid,
)


def load_and_save(folder: Path, load: int | None, save: int, ep: int = 1, replicate: int = 1) -> None:
    """Resume from step ``load`` over this world, check every bit, save as step ``save``."""
    ps = grid(ep, replicate)
    state, saver = fill(build(ps), ps, 99), Checkpointer(folder, control=ps.control)
    if load is not None:
        assert saver.load_latest(state) == EXTRA
        assert_holds(state, ps, load)
    saver.save(fill(state, ps, save), EXTRA)


def stored_values(step: Path) -> dict[str, torch.Tensor]:
    """The whole tensors as a tool that knows nothing of ranks reads them."""
    stores = [native.open_tensors(step, part) for part in ("model", "optimizer")]
    return {name: store.read(name) for store in stores for name in store.names()}


LAYOUTS = [  # (ranks, ep, replicate): expert-parallel 4 -> 2 -> 1 -> 2, copies 1 -> 2 -> 4, efsdp 1 -> 2, back
    (4, 4, 1),
    (2, 2, 1),
    (1, 1, 1),
    (4, 2, 2),
    (4, 2, 1),
    (2, 1, 2),
    (4, 1, 4),
    (3, 1, 1),
    (4, 4, 1),
]


def test_any_layout_resumes_from_any_other_bit_for_bit(tmp_path):
    folder, load = tmp_path / "checkpoints", None
    for step, (world, ep, replicate) in enumerate(LAYOUTS, start=1):
        if world == 1:
            load_and_save(folder, load, step)
        else:
            run_ranks(world, load_and_save, tmp_path, folder, load, step, ep, replicate)
        load, path = step, folder / native.step_name(step)
        native.verify(path)
        stored, expected = stored_values(path), full_values(step)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], expected[name]) for name in expected)
        assert_nothing_twice(path, expected, world)


def assert_nothing_twice(step: Path, expected: dict, world: int) -> None:
    """Copies on several ranks are written once, and the writing is shared among the ranks."""
    for part in ("model", "optimizer"):
        files = list((step / part).glob("*.safetensors"))
        pieces = [(name, p) for name, t in read_layout(files).items() for p in t.pieces]
        elements = sum(torch.Size(piece.shape).numel() for _, piece in pieces)
        assert elements == sum(expected[name].numel() for name in {name for name, _ in pieces})
        assert len({piece.file.name[: len("shard-00001")] for _, piece in pieces}) == world


def test_pieces_that_are_empty_or_strided_lie_at_the_rows_they_belong_to(tmp_path):
    """ep 2 x efsdp 2: rank 1 holds experts 4 and 5, rank 2 holds 2 and 3; three rows of ``bias`` over four ranks."""
    run_ranks(4, load_and_save, tmp_path, tmp_path / "c", None, 1, 2, 1)
    files = sorted((tmp_path / "c" / "step_00000001" / "model").glob("*.safetensors"))
    first = {f.name[:11]: {n: t.pieces[0].offsets[0] for n, t in read_layout([f]).items()} for f in files}
    experts = {rank: rows["experts.gate_up"] for rank, rows in first.items()}
    assert experts == {"shard-00001": 0, "shard-00002": 4, "shard-00003": 2, "shard-00004": 6}
    assert {rank: rows["bias"] for rank, rows in first.items()} == {
        "shard-00001": 0, "shard-00002": 1, "shard-00003": 2, "shard-00004": 3,
    }  # fmt: skip
    assert TensorStore(files).info("bias").shape == SHAPES["bias"]


def hashed_files(folder: Path) -> tuple[list[str], list[str]]:
    """Files that this rank hashes, in a save and in a load."""
    ps = grid(ep=2)
    state, saver, hashed = fill(build(ps), ps, 1), Checkpointer(folder, control=ps.control), []
    digest = native.sha256_file
    native.sha256_file = lambda path: hashed.append(f"{path.parent.name}/{path.name}") or digest(path)
    saver.save(state, EXTRA)
    saved, hashed[:] = list(hashed), []
    saver.load_latest(state)
    return saved, hashed


def test_hashing_is_shared_among_the_ranks(tmp_path):
    ranks = run_ranks(2, hashed_files, tmp_path, tmp_path / "c")
    step = tmp_path / "c" / "step_00000001"
    shards = {f"{p.parent.name}/{p.name}" for p in step.rglob("*.safetensors")}
    for rank, (saved, _) in enumerate(ranks):  # a rank hashes what it wrote
        own = {name for name in shards if f"shard-0000{rank + 1}" in name}
        assert {name for name in saved if name.endswith(".safetensors")} == own
    loaded = [name for _, hashed in ranks for name in hashed]
    assert sorted(loaded) == sorted({*shards, "step_00000001/state.json"})
    assert max(len(hashed) for _, hashed in ranks) == -(-len(loaded) // 2)


# ---- completeness: something gets lost between the write and the check


def lose(kind: str, model: Path) -> None:
    """Damage what rank 1 of 2 wrote: it holds experts 4-7 and rows 4-6 of ``wide``."""
    (file,) = model.glob("shard-00002-*.safetensors")
    if kind == "file":
        file.unlink()
        return
    pieces = load_file(file)
    offsets = {
        name: {"saved_offsets": p.offsets} for name, t in read_layout([file]).items() for p in t.pieces
    }
    if kind == "piece":
        del pieces["experts.gate_up"]
    elif kind == "rows":
        pieces["experts.gate_up"] = pieces["experts.gate_up"][:3].contiguous()
    elif kind == "place":
        offsets["experts.gate_up"] = {"saved_offsets": (2, 0, 0)}
    elif kind == "dtype":
        pieces = {name: piece.double() for name, piece in pieces.items()}
    elif kind == "name":
        pieces["other"] = torch.ones(2)
    save_file(
        pieces, file, {"DCP_SHARDING_INFO": json.dumps({n: offsets[n] for n in pieces if n in offsets})}
    )


LOST = {
    "file": r"model tensor wide has 7 rows; missing: rows 4-6",
    "piece": r"model tensor experts\.gate_up has 8 rows; missing: rows 4-7",
    "rows": r"model tensor experts\.gate_up has 8 rows; missing: row 7",
    "place": r"tensor experts\.gate_up has 8 rows; stored twice: rows 2-3; missing: rows 6-7",
    "dtype": r"shard-00002.*tensor \S+ contradicts its other pieces",
    "name": r"tensor other does not belong here",
}


def save_and_lose(folder: Path, kinds: list[str]) -> list[str]:
    ps = grid(ep=2)
    state, saver, write = build(ps), Checkpointer(folder, control=ps.control), checkpointer.write_tensors
    saver.save(fill(state, ps, 1), EXTRA)
    messages = []
    for kind in kinds:

        def write_and_lose(ranks, tensors, into, target, kind=kind):
            files = write(ranks, tensors, into, target)
            if ps.rank == 0 and into.name == "model":
                lose(kind, into)
            return files

        checkpointer.write_tensors = write_and_lose
        with pytest.raises(DataError) as caught:
            saver.save(fill(state, ps, 2), EXTRA)
        messages.append(str(caught.value))
        if ps.rank == 0:
            assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]
    checkpointer.write_tensors = write
    saver.load_latest(state)
    assert_holds(state, ps, 1)
    saver.save(fill(state, ps, 2), EXTRA)
    return messages


def test_a_checkpoint_without_every_expert_never_becomes_latest(tmp_path):
    first, second = run_ranks(2, save_and_lose, tmp_path, tmp_path / "c", list(LOST))
    assert first == second
    for kind, message in zip(LOST, first, strict=True):
        assert re.search(LOST[kind], message), message
        assert f"{tmp_path / 'c' / 'step_00000002'}: not everything that the ranks wrote is there" in message
        assert "Checkpoints written before stay usable" in message
    assert (tmp_path / "c" / "latest").read_text() == "step_00000002\n"
