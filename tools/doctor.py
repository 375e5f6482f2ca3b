"""Show what this machine can run: versions, processors, and every operation's backends or why they are unusable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import megatron_nucleus
from megatron_nucleus.ops import registry
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError

PACKAGES = (
    "torch", "numpy", "triton", "diffusers", "transformers", "accelerate", "safetensors", "pyarrow", "pillow",
    "webdataset", "flash-attn", "transformer-engine", "nvidia-dali-cuda130", "ray",
)  # fmt: skip


def main() -> None:
    parser = Parser(prog="tools/doctor.py", description=__doc__)
    parser.add_argument(
        "--device", metavar="{cpu,cuda}", help="device to ask for [default cuda if there is a GPU, else cpu]"
    )
    add_json_flag(parser)
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: '{device}' is not allowed; one of: cpu, cuda")
    report = {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "device": device,
        "backends": backend_table(device),
    }
    show(report)
    if args.json:
        print_json(report)


def versions() -> dict[str, str | None]:
    """Installed versions; None = not installed. Nothing is imported for it."""
    found = {"megatron-nucleus": megatron_nucleus.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu() -> dict:
    """Model name, cores this process may use, torch's threads and vector unit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> list[dict]:
    """Name, memory and compute capability of every visible NVIDIA GPU."""
    if not torch.cuda.is_available():
        return []
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in every
    ]


def backend_table(device: str) -> list[dict]:
    """One row per operation and backend; ``chosen`` marks what ``auto`` resolves to on ``device``."""
    rows = []
    for op in registry.operations():
        chosen = registry.choose(op, "auto", device_type=device).backend
        for row in registry.backends(op):
            reason = registry.why_unavailable(op, row.backend, device_type=device)
            rows.append(
                {
                    "op": op,
                    "backend": row.backend,
                    "usable": reason is None,
                    "chosen": row.backend == chosen,
                    "note": row.note,
                    "reason": reason,
                }
            )
    return rows


def show(report: dict) -> None:
    """Print the report for a person."""
    print("versions")
    for name, version in report["versions"].items():
        print(f"  {name:22}{version or '-'}")
    c = report["cpu"]
    print(f"cpu\n  {c['model']}, {c['cores']} cores, {c['threads']} torch threads, {c['vector_unit']}")
    print("gpu")
    for g in report["gpus"]:
        print(f"  {g['name']}, {g['memory_bytes'] / 2**30:.0f} GiB, compute capability {g['capability']}")
    if not report["gpus"]:
        print("  none")
    print(f"backends on {report['device']} (* = what 'auto' takes)")
    for row in report["backends"]:
        state = row["note"] if row["usable"] else f"unusable: {row['reason']}"
        print(f"  {'*' if row['chosen'] else ' '} {row['op']:22}{row['backend']:11}{state}")


if __name__ == "__main__":
    run(main)
