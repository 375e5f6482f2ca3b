"""Time every operation's backends beside plain torch: forward, and forward with backward, at the demo's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_nucleus.ops import registry
from megatron_nucleus.utils.cli import add_json_flag, print_json, run
from megatron_nucleus.utils.config import Parser, coerce
from megatron_nucleus.utils.errors import ConfigError

WIDTH, EXPERTS, HIDDEN, CAPACITY_FACTOR = 128, 8, 128, 2  # preset `demo`
HEADS, KV_HEADS, HEAD_WIDTH, TEXT_TOKENS = 4, 2, 32, 24


def main() -> None:
    parser = Parser(prog="tools/bench_ops.py", description=__doc__)
    parser.add_argument("--images", default="64", metavar="N", help="images in the batch [64]")
    parser.add_argument("--tokens", default="64", metavar="N", help="image tokens per image [tokens, 64]")
    parser.add_argument("--threads", default="1", metavar="N", help="CPU threads [1]")
    parser.add_argument("--repeats", default="50", metavar="N", help="timed calls of each backend [50]")
    parser.add_argument("--device", metavar="{cpu,cuda}", help="[default cuda if there is a GPU, else cpu]")
    add_json_flag(parser)
    args = parser.parse_args()
    numbers = {name: positive(args, name) for name in ("images", "tokens", "threads", "repeats")}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: '{device}' is not allowed; one of: cpu, cuda")
    torch.set_num_threads(numbers["threads"])
    rows = []
    print(f"{'operation':22}{'backend':11}{'forward':>12}{'ratio':>7}{'with backward':>15}{'ratio':>7}")
    for op, inputs in shapes(numbers["images"], numbers["tokens"], device).items():
        rows += measure(op, inputs, numbers["repeats"], device)
    if args.json:
        print_json({**numbers, "device": device, "torch": torch.__version__, "rows": rows})


def positive(args, name: str) -> int:
    value = coerce(getattr(args, name), int, f"--{name}")
    if value < 1:
        raise ConfigError(f"--{name}: must be at least 1, got {value}")
    return value


def shapes(B: int, S: int, device: str) -> dict[str, tuple]:
    """Arguments of every operation as the demo's model calls it."""
    D, E, F = WIDTH, EXPERTS, HIDDEN
    C = max(1, -(-CAPACITY_FACTOR * S // E))
    generator = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    order = torch.rand(E, B, S, generator=generator).argsort(-1)[..., :C]  # C distinct tokens of every image
    index = (order + S * torch.arange(B).view(1, B, 1)).flatten().to(device)
    N, T, K = E * B * C, S + TEXT_TOKENS, HEAD_WIDTH
    mask = torch.arange(T)[None] < S + torch.randint(4, TEXT_TOKENS + 1, (B, 1), generator=generator)
    return {
        "moe_gather": (x(B * S, D), index),
        "moe_combine": (x(B * S, D), x(N, D), x(N), index),
        "modulated_layer_norm": (x(B, S, D), x(B, D), 1e-6, True),
        "rms_norm": (x(B, S, HEADS, K), x(K), 1e-6),
        "swiglu": (x(E, B * C, 2 * F),),
        "attention": (x(B, S, HEADS, K), x(B, T, KV_HEADS, K), x(B, T, KV_HEADS, K), mask.to(device)),
        "expert_choice": (x(B, S, E), C, False, 2.5),
        "expert_ffn": (x(E, B * C, D), x(E, D, 2 * F), x(E, F, D)),
    }


def measure(op: str, args: tuple, repeats: int, device: str) -> list[dict]:
    """Time all usable backends of ``op`` in turns, so that a busy moment hits each alike; print and return rows."""
    usable = [
        r for r in registry.backends(op) if not registry.why_unavailable(op, r.backend, device_type=device)
    ]
    functions = [registry.resolve(op, r.backend, device_type=device) for r in usable]
    grads = [torch.randn_like(o) for o in smooth(functions[0](*args))]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def forward(function: Callable) -> None:
        with torch.no_grad():
            function(*args)

    def both(function: Callable) -> None:
        torch.autograd.grad(smooth(function(*args)), wanted, grads)

    forward_s, both_s = (best_of(call, functions, repeats, device) for call in (forward, both))
    rows = []
    for row, f, b in zip(usable, forward_s, both_s, strict=True):
        rows.append({"op": op, "backend": row.backend, "forward_s": f, "forward_ratio": forward_s[0] / f,
                     "step_s": b, "step_ratio": both_s[0] / b})  # fmt: skip
        print(
            f"{op:22}{row.backend:11}{f * 1e3:9.3f} ms{forward_s[0] / f:7.2f}"
            f"{b * 1e3:12.3f} ms{both_s[0] / b:7.2f}",
            flush=True,
        )
    return rows


def smooth(result) -> list[Tensor]:
    """The outputs that carry a gradient."""
    outputs = result if isinstance(result, tuple) else (result,)
    return [o for o in outputs if o is not None and o.requires_grad]


def best_of(call: Callable, functions: list[Callable], repeats: int, device: str) -> list[float]:
    """Shortest of ``repeats`` times per function: what the machine can do when nothing else runs."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats + 2):  # the first two warm caches and allocators up and are rarely the shortest
        for i, function in enumerate(functions):
            start = time.perf_counter()
            call(function)
            if device == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    run(main)
