"""tools/profile_train.py: the shares, the named regions in the trace, the memory, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch

from megatron_nucleus.training.profiling import profile as profiling
from megatron_nucleus.training.profiling.kernels import KernelRow, table, with_shares
from megatron_nucleus.training.profiling.regions import REGIONS, STEP_PARTS
from megatron_nucleus.utils.errors import ConfigError
from tests.ranks import run_ranks
from tests.training.test_regions import Listing
from tools.profile_train import main

SMALL = [
    "--num-layers", "2", "--num-experts", "4", "--capacity-factors", "2", "--global-batch-size", "4",
    "--micro-batch-size", "2", "--grid", "2", "3", "--text-tokens", "5", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """(result, folder) of one profile of two steps, each of two micro-batches of a dense and an MoE layer."""
    folder = tmp_path_factory.mktemp("profile") / "new"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*SMALL, "--output", str(folder), "--profile-warmup", "1", "--top", "3", "--json"])
    return json.loads(out.getvalue().splitlines()[-1]), folder


def events(folder) -> list[dict]:
    return json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_shares_add_up_and_times_are_those_of_the_step(profile):
    result, _ = profile
    assert sum(row["share_frac"] for row in result["kernels"]) == pytest.approx(1.0)
    assert sum(row["self_s"] for row in result["kernels"]) == pytest.approx(
        result["steps"] * result["self_s"]
    )
    times = [row["self_s"] for row in result["kernels"]]
    assert times == sorted(times, reverse=True)
    whole_s = sum(result["regions"][part]["total_s"] for part in STEP_PARTS)
    assert 0 < result["self_s"] < whole_s  # the rest is Python's
    names = {row["name"] for row in result["kernels"]}
    assert {"aten::mm", "aten::bmm"} <= names
    assert not names & {*STEP_PARTS, *REGIONS, "_EdgeBackward", "[memory]"}


def test_every_region_is_in_the_trace_as_often_as_it_runs(profile):
    result, folder = profile
    assert set(result["regions"]) == {*STEP_PARTS, *REGIONS}
    calls = {name: row["calls"] for name, row in result["regions"].items()}
    # Two micro-batches; each region once forward and once backward, attention in both layers.
    inner = dict.fromkeys(REGIONS, 4) | {"attention": 8}
    assert calls == inner | {"data": 2, "forward": 2, "backward": 2, "optimizer": 1}
    named = [e for e in events(folder) if e.get("cat") == "user_annotation"]
    assert {e["name"] for e in named} == {*STEP_PARTS, *REGIONS}
    assert len(named) == result["steps"] * sum(calls.values())


def check_nested(found: list[dict]) -> None:
    """No event ends behind one that it began in."""
    open_until: list[float] = []
    for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_until and open_until[-1] <= start:
            open_until.pop()
        assert not open_until or end <= open_until[-1], event["name"]
        open_until.append(end)


def test_regions_nest_on_their_own_line_of_the_trace(profile):
    """Viewers drop what overlaps without nesting."""
    _, folder = profile
    named = [e for e in events(folder) if e.get("cat") == "user_annotation"]
    assert {e["tid"] for e in named} == {"regions"}
    check_nested(named)
    assert "host_name" not in json.loads((folder / "trace.json").read_text())


def of_a_rank(folder) -> str:
    """What a rank prints. Other ranks profile nothing and print nothing."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(
            [
                *SMALL, "--expert-model-parallel-size", "2", "--output", str(folder), "--profile-warmup", "1",
                "--profile-steps", "1", "--json",
            ]
        )  # fmt: skip
    return out.getvalue()


@pytest.mark.dist
def test_with_several_ranks_the_regions_are_ours_alone(tmp_path):
    """FSDP and gloo name ranges, too, which overlap with ours and with each other."""
    folder = tmp_path / "profile"
    first, second = run_ranks(2, of_a_rank, tmp_path, folder)
    result = json.loads(first.splitlines()[-1])
    assert second == ""
    assert set(result["regions"]) == {*STEP_PARTS, *REGIONS}
    assert (
        result["regions"]["dispatch"]["calls"] == 4
    )  # one micro-batch and MoE layer: sent and there, both passes
    named = [e for e in events(folder) if e.get("cat") == "user_annotation"]
    assert {e["name"] for e in named if e["tid"] == "regions"} == {*STEP_PARTS, *REGIONS}
    assert any(e["name"].startswith("FSDP::") and e["tid"] != "regions" for e in named)
    check_nested([e for e in named if e["tid"] == "regions"])


def test_memory_over_time(profile):
    result, folder = profile
    timeline = json.loads((folder / "memory.json").read_text())
    assert [p["time_s"] for p in timeline] == sorted(p["time_s"] for p in timeline)
    total = 0
    for point in timeline:
        total += point["bytes"]
        assert point["allocated_bytes"] == total
    assert result["peak_allocated_bytes"] == max(p["allocated_bytes"] for p in timeline)
    # At least the gradients of all weights are alive at once: 650,000 fp32 values.
    assert result["peak_allocated_bytes"] > 2_000_000


def test_files_and_table(profile):
    result, folder = profile
    assert {f.name for f in folder.iterdir()} == set(result["files"])
    assert json.loads((folder / "profile.json").read_text()) == result
    lines = (folder / "kernels.md").read_text().splitlines()
    assert len(lines) == 2 + 3 + 1
    shares = [float(line.split("|")[-2].strip(" %")) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert f"`{len(result['kernels']) - 3} others`" in lines[-1]


def test_without_memory(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*SMALL, "--output", str(tmp_path), "--profile-steps", "1", "--no-memory", "--json"])
    result = json.loads(out.getvalue().splitlines()[-1])
    assert "peak_allocated_bytes" not in result
    assert not (tmp_path / "memory.json").exists()


def test_files_of_an_earlier_profile_do_not_stay_beside_the_new_ones(tmp_path):
    """Such as the memory of another model; what is not a profile's is left alone."""
    for name in ("memory.json", "memory.pickle", "mine.txt"):
        (tmp_path / name).write_text("old")
    with contextlib.redirect_stdout(io.StringIO()):
        main(
            [
                *SMALL,
                "--output",
                str(tmp_path),
                "--profile-steps",
                "1",
                "--profile-warmup",
                "0",
                "--no-memory",
            ]
        )
    assert {f.name for f in tmp_path.iterdir()} == {"trace.json", "kernels.md", "profile.json", "mine.txt"}


def test_nvtx_names_the_profiled_steps_alone(monkeypatch, capsys, tmp_path):
    """What nsys and ncu hear, recorded in place of a GPU: warm-up, then the steps between the profiler's two marks."""
    heard = []

    class Recording(Listing):
        def enter(self, name):
            heard.append(name)
            super().enter(name)

    monkeypatch.setattr(profiling, "nvtx_ranges", Recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for mark in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, mark, lambda mark=mark: heard.append(mark))
    main([*SMALL, "--nvtx", "--profile-steps", "1", "--output", str(tmp_path / "none"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"steps": 1, "device": "a GPU"}
    assert (heard[0], heard[-1]) == ("start", "stop")
    assert heard.count("data") == 2  # two micro-batches
    assert {"dispatch", "experts", "attention", "optimizer"} <= set(heard)
    assert not (tmp_path / "none").exists()


def test_rows_of_a_table():
    rows = with_shares([("b", 4, 1.0), ("a", 2, 1.0), ("c|d", 6, 2.0), ("nothing", 1, 0.0)])
    assert rows[0] == KernelRow("c|d", 6, 2.0, 0.5)
    assert [row.name for row in rows] == ["c|d", "a", "b", "nothing"]
    text = table(rows, top=2, steps=2).splitlines()
    assert text[2] == "| `c\\|d` | 3 | 1000.000 | 50.0% |"
    assert text[3] == "| `a` | 1 | 500.000 | 25.0% |"
    assert text[4] == "| `2 others` | 2.5 | 500.000 | 25.0% |"
    assert with_shares([("a", 1, 0.0)]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile-steps", "0"], "--profile-steps 0: must be at least 1"),
        (["--top", "0"], "--top 0"),
        (["--output", __file__], "is a file"),
        (["--output", f"{__file__}/inside"], "--output .*/inside: Not a directory; name another folder"),
        (["--output", "/proc/none/inside"], "--output /proc/none/inside: .*name another folder"),
        (["--steps", "3"], "--steps"),  # of another program; --profile-steps is this one's
        (["--compare", "diffusers"], "--compare"),
        (["--grid", "0", "3"], "--grid 0 3"),
        pytest.param(
            ["--nvtx"],
            "--nvtx: torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        main([*SMALL, *arguments])


@pytest.mark.gpu
def test_a_gpu_has_kernels_and_a_snapshot(tmp_path):
    flags = [flag for flag in SMALL if flag != "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*flags, "cuda", "--output", str(tmp_path), "--json"])
    result = json.loads(out.getvalue().splitlines()[-1])
    assert sum(row["share_frac"] for row in result["kernels"]) == pytest.approx(1.0)
    assert not any(row["name"].startswith("aten::") for row in result["kernels"])
    assert (tmp_path / "memory.pickle").stat().st_size > 1000
    assert {*STEP_PARTS, *REGIONS} <= set(result["regions"])
