"""Profiles a few whole training steps: a trace, the most costly operations, and the memory over time.

What a folder holds afterwards:

    trace.json      Chrome trace with the named regions; open it at https://ui.perfetto.dev or chrome://tracing
    kernels.md      the operations that take the most time
    profile.json    the same with everything else in it
    memory.json     on a CPU: bytes allocated over time
    memory.pickle   on a GPU: the allocator's history; open it at https://pytorch.org/memory_viz

With NVTX ranges nothing of this is written: the profiler outside, nsys or ncu, does it. Two at once cannot share
the GPU's counters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_nucleus.training.benchmark.breakdown import Step
from megatron_nucleus.training.profiling.kernels import kernel_rows, table
from megatron_nucleus.training.profiling.ranges import ProfilerRanges, nvtx_ranges
from megatron_nucleus.training.profiling.regions import REGIONS, SILENT, STEP_PARTS, Sink
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic

REGIONS_LINE = "regions"
OURS = frozenset((*STEP_PARTS, *REGIONS))  # FSDP and the collectives name ranges of their own
FILES = ("trace.json", "kernels.md", "profile.json", "memory.json", "memory.pickle")
MEMORY_EVENTS = 200_000  # of the GPU allocator's history: some 100 MB in the file; own choice


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is profiled and what is written."""

    output: Path = knob(Path("runs/profile"), "folder for trace, tables and memory")
    profile_steps: int = knob(2, "profiled steps", unit="steps")
    profile_warmup: int = knob(3, "steps before them", unit="steps")
    top: int = knob(20, "rows of the table of operations", unit="rows")
    memory: bool = knob(True, "record allocations, too; makes the step slower")
    nvtx: bool = knob(False, "name the parts by NVTX ranges for nsys and ncu instead; needs a GPU")

    def __post_init__(self) -> None:
        for name, least in (("profile_steps", 1), ("profile_warmup", 0), ("top", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {getattr(self, name)}: must be at least {least}")
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"--output {self.output}: is a file; give a folder")


def start_up_check(config: ProfileConfig) -> None:
    """Refuse what cannot work here, before a model is built.

    Raises:
        ConfigError: NVTX ranges without a GPU, or a folder that cannot be made or written to.
    """
    if config.nvtx:
        nvtx_ranges()
        return
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {config.output}: {error.strerror}; name another folder") from None
    if not os.access(config.output, os.W_OK):
        raise ConfigError(f"--output {config.output}: no right to write there; name another folder")


def profile_step(step: Step, config: ProfileConfig, device: torch.device, rank: int = 0) -> dict:
    """Run and profile ``step``; every rank runs it, rank 0 alone traces and writes.

    Returns:
        the object of ``profile.json`` (with NVTX: steps alone): ``steps``, ``device``, ``files``, ``self_s`` (own
        time of all operations in one step), ``regions`` (name, calls per step, and seconds of one step from
        first line to last, regions inside and on a GPU the host's time, included) and ``kernels``
        (`kernels.KernelRow`, of all profiled steps).
    """
    if config.nvtx:
        return _run_with_nvtx(step, config, device)
    for _ in range(config.profile_warmup):
        step(SILENT)
    if rank != 0:
        for _ in range(config.profile_steps):
            step(SILENT)
        return {}
    for name in FILES:  # of an earlier profile, whose files need not be the same
        (config.output / name).unlink(missing_ok=True)
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    record_memory = _gpu_history(config.output / "memory.pickle") if config.memory and on_gpu else None
    with record_memory or contextlib.nullcontext():
        profile = torch.profiler.profile(activities=activities, profile_memory=config.memory and not on_gpu)
        with profile:
            _run(step, ProfilerRanges(), config.profile_steps, device)
    return _write(profile, config, on_gpu)


def _run(step: Step, sink: Sink, steps: int, device: torch.device) -> None:
    with step.named(sink):
        for _ in range(steps):
            step(sink)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _run_with_nvtx(step: Step, config: ProfileConfig, device: torch.device) -> dict:
    sink = nvtx_ranges()
    for _ in range(config.profile_warmup):
        step(SILENT)
    torch.cuda.synchronize(device)
    # nsys --capture-range=cudaProfilerApi and ncu --profile-from-start off record what is between these two.
    torch.cuda.profiler.start()
    _run(step, sink, config.profile_steps, device)
    torch.cuda.profiler.stop()
    return {"steps": config.profile_steps, "device": torch.cuda.get_device_name(device)}


def _write(profile: torch.profiler.profile, config: ProfileConfig, on_gpu: bool) -> dict:
    folder, steps = config.output, config.profile_steps
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    tidy_trace(trace)
    rows = kernel_rows(profile, on_gpu)
    write_atomic(folder / "kernels.md", table(rows, config.top, steps) + "\n")
    result = {
        "steps": steps,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "self_s": sum(row.self_s for row in rows) / steps,
        "regions": regions_of(profile, steps),
        "kernels": [dataclasses.asdict(row) for row in rows],
        "files": [trace.name, "kernels.md", "profile.json"],
    }
    if config.memory and on_gpu:
        result["files"].append("memory.pickle")
    elif config.memory:
        timeline = memory_timeline(trace)
        write_json_atomic(folder / "memory.json", timeline)
        result["files"].append("memory.json")
        result["peak_allocated_bytes"] = max((point["allocated_bytes"] for point in timeline), default=0)
    write_json_atomic(folder / "profile.json", result)
    return result


def regions_of(profile: torch.profiler.profile, steps: int) -> dict[str, dict[str, float]]:
    """Calls and seconds per step of each of `OURS`, as the host saw them, by time."""
    rows = [
        r
        for r in profile.key_averages()
        if getattr(r, "is_user_annotation", False)
        and r.key in OURS
        and r.device_type == torch.autograd.DeviceType.CPU
    ]
    rows.sort(key=lambda r: (-r.cpu_time_total, r.key))
    return {r.key: {"calls": r.count / steps, "total_s": r.cpu_time_total / 1e6 / steps} for r in rows}


def tidy_trace(path: Path) -> None:
    """Put the named regions of a Chrome trace on a line of their own, and leave out the host's name.

    In the backward pass a region begins inside of one operator's event and ends inside of another's. Viewers drop
    events that overlap without nesting; on their own line the regions nest. Ranges of others (FSDP's, those of
    collectives, which end when the network does) stay on the lines of their threads.
    """
    trace = json.loads(path.read_text())
    trace.pop("host_name", None)
    for event in trace["traceEvents"]:
        if event.get("cat") == "user_annotation" and event.get("ph") == "X" and event["name"] in OURS:
            event["tid"] = REGIONS_LINE
    write_atomic(path, json.dumps(trace))


def memory_timeline(trace: Path) -> list[dict[str, float]]:
    """The CPU allocator's events in a Chrome trace: ``time_s`` since the first, change and sum in bytes.

    allocated_bytes counts what was allocated while the profiler looked, so weights are not in it, and freeing
    something older makes it smaller.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    found.sort(key=lambda e: e["ts"])
    out, allocated = [], 0
    for event in found:
        allocated += event["args"]["Bytes"]
        time_s = (event["ts"] - found[0]["ts"]) / 1e6
        out.append({"time_s": time_s, "bytes": event["args"]["Bytes"], "allocated_bytes": allocated})
    return out


@contextlib.contextmanager
def _gpu_history(path: Path):
    """Record the GPU allocator inside the block and write what it remembers."""
    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)  # torch has no public name for it
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def describe(result: dict, config: ProfileConfig, show: Callable[[str], None] = print) -> None:
    """Print what a person wants to see first."""
    if config.nvtx:
        show(f"{result['steps']} steps with NVTX ranges on {result['device']}")
        return
    show((config.output / "kernels.md").read_text().rstrip())
    regions = ", ".join(f"{name} {r['total_s'] * 1e3:.2f} ms" for name, r in result["regions"].items())
    show(f"regions, a step: {regions}")
    show(f"{config.output}: {', '.join(result['files'])}")
