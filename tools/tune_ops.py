"""Find the fastest tile sizes of the Triton kernels on this machine's GPU and write them down under its name.

Every candidate's results are compared with the default's before it is timed. The file takes the place of an older one
for the same GPU; kernels read it when they are next started. Example:

  tools/tune_ops.py --preset nucleus_image_17b --experts 8 --rows 1024 4096 16384
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_nucleus.core.models.presets import ModelConfig, ModelShape, resolve_shape
from megatron_nucleus.core.optimizer.muon import BATCH_VALUES
from megatron_nucleus.core.optimizer.param_groups import NO_SPLIT, matrices, rule_of
from megatron_nucleus.export.hf_keys import keys
from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.utils import cli
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import Origins
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.files import write_json_atomic
from megatron_nucleus.utils.revision import git_commit

ROWS = ("1024", "4096", "16384")  # powers of two: each stands for all sizes down to the one below


@dataclasses.dataclass(frozen=True)
class Flags:
    """Sections whose flags this program takes."""

    model: ModelConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = cfg.Parser(prog="tools/tune_ops.py", description=__doc__)
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), metavar="N",
        help=f"rows per expert, rounded up to powers of two [{' '.join(ROWS)}]",
    )  # fmt: skip
    parser.add_argument("--experts", metavar="N", help="experts on one GPU [the model's divided by 8]")
    parser.add_argument("--output", metavar="FILE", help="JSON file to write [triton_ops/tuned/<GPU>.json]")
    cli.add_json_flag(parser)
    cfg.add_arguments(parser, Flags)
    args = parser.parse_args(argv)
    shape = resolve_shape(cfg.from_dict(Flags, {}, flags=vars(args), where="flags", origins=Origins()).model)
    rows = sorted({1 << (positive(raw, "--rows") - 1).bit_length() for raw in args.rows})
    experts = positive(args.experts, "--experts") if args.experts else max(1, shape.num_experts // 8)
    if not torch.cuda.is_available():
        raise ConfigError("tools/tune_ops.py needs an NVIDIA GPU, none is visible")
    result = tune(shape, rows, experts, args.output)
    if args.json:
        cli.print_json(result)


def positive(raw: str, flag: str) -> int:
    value = cfg.coerce(raw, int, flag)
    if value < 1:
        raise ConfigError(f"{flag} {value}: must be at least 1")
    return value


def tune(shape: ModelShape, rows: list[int], experts: int, output: str | None) -> dict:
    """Measure, print and write; returns what was written."""
    import triton

    from triton_ops import tuner, tuning

    device = torch.device("cuda")
    hardware = tuning.hardware_name(device)
    path = Path(output) if output else tuning.FOLDER / f"{hardware}.json"
    if path.is_dir():
        raise ConfigError(f"--output {path}: a folder, give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for work in tuner.works(
        torch.bfloat16, device, experts=experts, rows=rows, width=shape.width,
        hidden=shape.moe_intermediate_dim, matrices=orthogonalised(shape), stack_values=BATCH_VALUES["cuda"],
    ):  # fmt: skip
        try:
            outcome = tuner.choose(work)
        except RuntimeError as error:
            raise ConfigError(f"nothing is written: {error}") from error
        outcomes.append(outcome)
        gain = outcome.default_seconds / outcome.seconds
        print(
            f"{outcome.op}, {outcome.shape}: {outcome.seconds * 1e6:.1f} us, {gain:.2f}x, {tuple(outcome.tile)}"
        )
        for tile, reason in outcome.refused.items():
            print(f"    not {tuple(tile)}: {reason}")
    made_with = versions() | {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": git_commit(),
    }
    measured = [(o.op, o.shape, o.tile, o.seconds, o.default_seconds) for o in outcomes]
    result = tuning.content(hardware, made_with, measured)
    write_json_atomic(path, result)
    print(f"{path}: {len(outcomes)} shape classes")
    return result


def orthogonalised(shape: ModelShape) -> set[tuple[int, int]]:
    """(rows, columns), rows <= columns, of the matrices that Muon trains."""
    found = set()
    for key in keys(shape):
        split = rule_of(key.native).split
        if split != NO_SPLIT:
            *lead, a, b = matrices(split, tuple(key.shape))
            if math.prod(lead):
                found.add((min(a, b), max(a, b)))
    return found


if __name__ == "__main__":
    cli.run(main)
