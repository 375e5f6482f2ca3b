"""Time every operation's backends: against plain torch, and against what the machine can do at most.

Forward, and forward with backward. The ceilings are a large matrix product and a large copy, measured in the same run,
and for what fits into a cache a copy of that size; "of ceiling" is the least time that an operation's FLOPs and bytes
take at these rates, divided by its own time. On a GPU times are those between two events, with a cold cache, and hold
the host's time only where it is the longer one. `orthogonalize` of the published layer is 6 TFLOP: leave it out on a
CPU with --ops. Examples:

  tools/bench_ops.py --threads 1 --tokens 16 --repeats 100
  tools/bench_ops.py --shapes demo 17b-layer --dtype bfloat16 --record benchmarks/ops.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_nucleus.ops import registry
from megatron_nucleus.training.benchmark.op_cases import CASES, SHAPES, Cost, Dims, Maker, dims
from megatron_nucleus.training.benchmark.parts import Spread, interleave
from megatron_nucleus.training.benchmark.record import check_record, provenance, record, where
from megatron_nucleus.training.benchmark.roofline import Ceilings, OpClock, measure_ceilings, synchronize
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError, nearest

WARMUP = 2  # calls before the timed ones: caches, allocators, autotuning
TITLE = "Operations"  # of the recorded table


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags, checked. images, tokens: None = the shape's own."""

    shapes: tuple[str, ...]
    ops: tuple[str, ...]
    images: int | None
    tokens: int | None
    threads: int
    repeats: int
    device: str
    dtype: str


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    settings = checked(args)
    target = check_record(args.record, TITLE) if args.record else None
    torch.set_num_threads(settings.threads)
    result = bench(settings)
    if target:
        entry = provenance(["tools/bench_ops.py", *words], settings.device) | {"result": result}
        record(target, entry, TITLE, markdown)
        print(f"recorded in {target} and {target.with_suffix('.json')}")
    if args.json:
        print_json(result)


def parser() -> Parser:
    """All flags."""
    out = Parser(prog="tools/bench_ops.py", description=__doc__)
    names = ", ".join(SHAPES)
    out.add_argument("--shapes", nargs="+", default=["demo"], metavar="NAME", help=f"sizes: {names} [demo]")
    out.add_argument("--ops", nargs="+", default=[], metavar="NAME", help="operations [all]")
    out.add_argument("--images", metavar="N", help="images in the batch [the shape's]")
    out.add_argument("--tokens", metavar="N", help="image tokens per image [tokens, the shape's]")
    out.add_argument("--threads", default="1", metavar="N", help="CPU threads [1]")
    out.add_argument("--repeats", default="50", metavar="N", help="timed calls of each backend [50]")
    out.add_argument("--device", metavar="{cpu,cuda}", help="[default cuda if there is a GPU, else cpu]")
    out.add_argument("--dtype", default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} [float32]")
    out.add_argument(
        "--record", metavar="FILE.md", help="keep the result in this table and the JSON file beside it"
    )
    add_json_flag(out)
    return out


def checked(args: argparse.Namespace) -> Settings:
    """The flags as `Settings`.

    Raises:
        ConfigError: naming the flag.
    """
    numbers = {
        name: None if getattr(args, name) is None else positive(args, name)
        for name in ("images", "tokens", "threads", "repeats")
    }
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for flag, names, allowed in (
        ("--device", [device], ("cpu", "cuda")),
        ("--dtype", [args.dtype], tuple(DTYPES)),
        ("--shapes", args.shapes, tuple(SHAPES)),
        ("--ops", args.ops, tuple(CASES)),
    ):
        for name in names:
            if name not in allowed:
                raise ConfigError(
                    f"{flag}: '{name}' is not allowed{nearest(name, allowed)}; one of: {', '.join(allowed)}"
                )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: torch finds no CUDA device here; use --device cpu")
    ops = tuple(args.ops) or tuple(op for op in registry.operations() if op in CASES)
    return Settings(tuple(args.shapes), ops, device=device, dtype=args.dtype, **numbers)


def positive(args: argparse.Namespace, name: str) -> int:
    value = coerce(getattr(args, name), int, f"--{name}")
    if value < 1:
        raise ConfigError(f"--{name}: must be at least 1, got {value}")
    return value


def bench(settings: Settings) -> dict:
    """Measure and print; returns the JSON object."""
    dtype = DTYPES[settings.dtype]
    ceilings = measure_ceilings(settings.device, dtype)
    print(
        f"ceilings: {ceilings.flops_per_s / 1e12:.3f} TFLOP/s ({settings.dtype} product), "
        f"{ceilings.bytes_per_s / 1e9:.1f} GB/s (copy, read + written)"
    )
    print(
        f"{'operation':22}{'backend':19}{'forward':>12}{'ratio':>7}{'of ceiling':>11}"
        f"{'with backward':>15}{'ratio':>7}{'of ceiling':>11}"
    )
    rows = []
    for name in settings.shapes:
        sizes = dims(name, settings.images, settings.tokens)
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in sizes._asdict().items())}")
        for op in settings.ops:
            rows += measure(op, name, sizes, settings, ceilings)
    return {
        **dataclasses.asdict(settings),
        "torch": str(torch.__version__),
        "ceilings": ceilings._asdict(),
        "rows": rows,
    }


def measure(op: str, shape: str, sizes: Dims, settings: Settings, ceilings: Ceilings) -> list[dict]:
    """Time all usable backends of ``op`` in turns, so that a busy moment hits each alike; print and return rows.

    The row of a backend that raises an error, forward or backward, has ``failed``, what it says, and no times; where
    that is plain torch, the others have no ratio.
    """
    device, dtype = settings.device, DTYPES[settings.dtype]
    asked = {"device_type": device, "dtype": dtype, "sizes": model_sizes(sizes)}
    usable = [
        r.backend for r in registry.backends(op) if not registry.why_unavailable(op, r.backend, **asked)
    ]
    args = CASES[op].arguments(sizes, Maker(device, dtype))
    cost = CASES[op].cost(sizes, dtype.itemsize)
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    functions, grads, rows = {}, [], []

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*args)

    def both(function: Callable) -> None:
        torch.autograd.grad(smooth(function(*args)), wanted, grads)

    for backend in usable:  # torch is the first
        function = registry.resolve(op, backend, **asked)
        try:
            grads = grads or [torch.randn_like(o) for o in smooth(function(*args))]
            if wanted:
                both(function)
            synchronize(device)  # a GPU reports the errors of a kernel here
        except Exception as error:  # a library's own refusal; the others are timed all the same
            rows.append(
                {"shape": shape, "op": op, "backend": backend, "failed": " ".join(str(error).split())}
            )
            print(line(rows[-1]), flush=True)
            continue
        functions[backend] = function
    near = ceilings.near(cost.forward_bytes, device)
    forward_s = take_turns(forward, functions, settings)
    both_s = take_turns(both, functions, settings) if wanted else None
    for backend in functions:
        row = {"shape": shape, "op": op, "backend": backend, "bytes_per_s": near.bytes_per_s}
        row |= {"flops": cost.forward_flops, "bytes": cost.forward_bytes}
        row |= timings("forward", forward_s, backend, near.floor_s(cost.forward_flops, cost.forward_bytes))
        if both_s is not None:
            row |= timings("step", both_s, backend, step_floor_s(cost, near))
        rows.append(row)
        print(line(row), flush=True)
    return rows


def model_sizes(d: Dims) -> registry.Sizes:
    """What of the sizes a backend may refuse."""
    return registry.Sizes(
        width=d.D, query_heads=d.H, kv_heads=d.G, head_width=d.K, experts=d.E, expert_width=d.F
    )


def step_floor_s(cost: Cost, ceilings: Ceilings) -> float:
    """Least seconds of forward and backward: one after the other, each at its own bound."""
    return ceilings.floor_s(cost.forward_flops, cost.forward_bytes) + ceilings.floor_s(
        cost.backward_flops, cost.backward_bytes
    )


def timings(part: str, times: dict[str, Spread], backend: str, floor_s: float) -> dict:
    """Figures of one part of a row: median, spread, ratio to plain torch and share of the ceiling."""
    mine, plain = times[backend], times.get("torch")
    return {
        f"{part}_s": mine.median_s,
        f"{part}_p25_s": mine.p25_s,
        f"{part}_p75_s": mine.p75_s,
        f"{part}_min_s": mine.min_s,
        f"{part}_ratio": plain.median_s / mine.median_s if plain else None,
        f"{part}_of_ceiling_frac": floor_s / mine.median_s,
    }


def line(row: dict) -> str:
    """A row for a person."""
    text = f"{row['op']:22}{row['backend']:19}"
    if "failed" in row:
        return f"{text}failed: {row['failed']}"
    for part, width in (("forward", 9), ("step", 12)):
        if f"{part}_s" in row:
            ratio = row[f"{part}_ratio"]
            text += f"{row[f'{part}_s'] * 1e3:{width}.3f} ms{'-' if ratio is None else f'{ratio:.2f}':>7}"
            text += f"{row[f'{part}_of_ceiling_frac']:11.0%}"
    return text


def smooth(result: object) -> list[Tensor]:
    """The outputs that carry a gradient."""
    outputs = result if isinstance(result, tuple) else (result,)
    return [o for o in outputs if o is not None and o.requires_grad]


def take_turns(call: Callable, functions: dict[str, Callable], settings: Settings) -> dict[str, Spread]:
    """Times of every function, `WARMUP` rounds aside."""
    calls = {name: functools.partial(call, function) for name, function in functions.items()}
    device = torch.device(settings.device)
    return interleave(calls, settings.repeats, WARMUP, device, clock=OpClock(device))


def markdown(entries: list[dict]) -> str:
    """The recorded table: one row per operation, backend and shape."""
    lines = [
        "Medians; ratio = plain torch's time divided by the backend's; of ceiling = least time at the measured rates "
        "divided by the backend's.",
        "",
        "| # | shape | operation | backend | forward | ratio | of ceiling | forward + backward | ratio | of ceiling "
        "| dtype | threads | hardware | torch | commit |",
        "|" + "---|" * 15,
    ]
    for number, entry in enumerate(entries, 1):
        result = entry["result"]
        for row in result["rows"]:
            cells = [
                number,
                row["shape"],
                f"`{row['op']}`",
                row["backend"] + (" (failed)" if "failed" in row else ""),
            ]
            for part in ("forward", "step"):
                there = f"{part}_s" in row
                cells.append(f"{row[f'{part}_s'] * 1e3:.3f} ms" if there else "-")
                ratio = row.get(f"{part}_ratio")
                cells.append("-" if ratio is None else f"{ratio:.2f}")
                cells.append(f"{row[f'{part}_of_ceiling_frac']:.0%}" if there else "-")
            cells += [result["dtype"], result["threads"], where(entry)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for number, entry in enumerate(entries, 1):
        c = entry["result"]["ceilings"]
        lines += [
            "",
            f"Ceilings of {number}: {c['flops_per_s'] / 1e12:.3f} TFLOP/s, {c['bytes_per_s'] / 1e9:.1f} GB/s.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
