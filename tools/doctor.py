"""Show what this machine can run: versions, processors, and every operation's backends or why they are unusable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import megatron_nucleus
from megatron_nucleus.backends import recorded, sdpa
from megatron_nucleus.core.kernels import sizes_of
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.core.moe import exchange
from megatron_nucleus.core.optimizer import adamw
from megatron_nucleus.core.precision import precision
from megatron_nucleus.data import decoders
from megatron_nucleus.ops import registry
from megatron_nucleus.ops.table import OF_THE_OPTIMIZER
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError, nearest

PACKAGES = (
    "torch", "numpy", "triton", "diffusers", "transformers", "accelerate", "safetensors", "pyarrow", "pillow",
    "webdataset", "flash-attn", "flash_attn_3", "flash-attn-4", "transformer-engine", "torchao",
    "nvidia-dali-cuda130", "ray",
)  # fmt: skip


def main() -> None:
    parser = Parser(prog="tools/doctor.py", description=__doc__)
    parser.add_argument(
        "--device", metavar="{cpu,cuda}", help="device to ask for [default cuda if there is a GPU, else cpu]"
    )
    parser.add_argument("--preset", metavar="NAME", help="also ask whether backends take this model's sizes")
    parser.add_argument(
        "--dtype", metavar="NAME", help="and this dtype of its activations [default bfloat16 with --preset]"
    )
    add_json_flag(parser)
    args = parser.parse_args()
    one_of("--preset", args.preset, PRESETS)
    one_of("--dtype", args.dtype, DTYPES)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: '{device}' is not allowed; one of: cpu, cuda")
    dtype = DTYPES[args.dtype or "bfloat16"] if args.dtype or args.preset else None
    sizes = sizes_of(PRESETS[args.preset]) if args.preset else None
    report = {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "device": device,
        "preset": args.preset,
        "backends": backend_table(device, dtype, sizes),
        "torch_attention": torch_attention(device, dtype, sizes),
        "adamw": {name: adamw.why_unavailable(name, device) for name in adamw.ADAMW_BACKENDS},
        "exchanges": {name: exchange.why_unavailable(name, device) for name in exchange.BACKENDS},
        "fp8": {name: precision.why_unavailable(name, device) for name in precision.BACKENDS},
        "decoders": {name: decoders.why_unavailable(name) for name in decoders.DECODERS},
        "recorded": recorded.states(),
    }
    show(report)
    if args.json:
        print_json(report)


def one_of(flag: str, value: str | None, allowed: dict) -> None:
    """Raise ConfigError for a value that is neither None nor allowed."""
    if value is not None and value not in allowed:
        guess = nearest(value, allowed)
        raise ConfigError(f"{flag}: '{value}' is not allowed{guess}; one of: {', '.join(allowed)}")


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


def backend_table(device: str, dtype: torch.dtype | None, sizes: registry.Sizes | None) -> list[dict]:
    """One row per operation and backend; ``chosen`` marks what ``auto`` resolves to on ``device``."""
    rows = []
    for op in registry.operations():
        asked = {
            "device_type": device,
            "dtype": None if op in OF_THE_OPTIMIZER else dtype,
            "sizes": sizes,
        }
        chosen = registry.choose(op, "auto", **asked).backend
        for row in registry.backends(op):
            reason = registry.why_unavailable(op, row.backend, **asked)
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


def torch_attention(
    device: str, dtype: torch.dtype | None, sizes: registry.Sizes | None
) -> dict[str, str] | None:
    """Which kernel torch's attention runs on with and without text masks; None where its device is missing.

    Asked for the published model in bfloat16 where nothing else is named.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return None
    sizes, dtype = sizes or sizes_of(PRESETS["nucleus_image_17b"]), dtype or torch.bfloat16
    cases = {"without_masks": False, "with_masks": True}
    return {name: sdpa.torch_takes(sizes, dtype, device, masked=masked) for name, masked in cases.items()}


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
    model = f" for {report['preset']}" if report["preset"] else ""
    print(f"backends on {report['device']}{model} (* = what 'auto' takes)")
    for row in report["backends"]:
        state = row["note"] if row["usable"] else f"unusable: {row['reason']}"
        print(f"  {'*' if row['chosen'] else ' '} {row['op']:22}{row['backend']:19}{state}")
    if report["torch_attention"]:
        kernels = report["torch_attention"]
        print(
            f"    attention 'torch' runs on: {kernels['without_masks']}, with masks {kernels['with_masks']}"
        )
    print("AdamW (--adamw-backend)\n    torch: fused kernel")
    for name, reason in report["adamw"].items():
        print(f"    {name}: {'never run by this project' if reason is None else f'unusable: {reason}'}")
    print("tokens between ranks (--moe-token-dispatcher-type)\n    alltoall: equal splits over NCCL or gloo")
    for name, reason in report["exchanges"].items():
        print(f"    {name}: {'never run by this project' if reason is None else f'unusable: {reason}'}")
    print("image decoders (--image-decoder)")
    for name, reason in report["decoders"].items():
        usable = "never run by this project" if name == decoders.DALI_MIXED else "runs here"
        print(f"    {name}: {usable if reason is None else f'unusable: {reason}'}")
    print("FP8 products (--fp8)")
    for name, reason in report["fp8"].items():
        usable = "plain torch, slow" if name == "emulated" else "never run on a GPU by this project"
        print(f"    {name}: {usable if reason is None else f'unusable: {reason}'}")
    print("optional libraries whose calls are recorded (read from their source, never run by this project)")
    for row in report["recorded"]:
        state = row["reason"] or "; ".join(row["changes"]) or "as recorded"
        print(f"    {row['library']:30}{row['version'] or '-':12}{state}")


if __name__ == "__main__":
    run(main)
