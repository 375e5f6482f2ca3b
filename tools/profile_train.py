"""Profile whole training steps: named parts, the most costly operations, a trace, and memory over time.

The model and its batch are those of a training configuration (--config FILE, or flags). Images and text are random
numbers, so no data is needed. On a GPU beside NVIDIA's profilers, which show the same names:

  tools/profile_train.py --config examples/demo_cpu.yaml --output runs/profile
  nsys profile --capture-range=cudaProfilerApi tools/profile_train.py --config FILE --nvtx
  ncu --nvtx --nvtx-include "experts/" --profile-from-start off tools/profile_train.py --config FILE --nvtx
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch.distributed as dist

from megatron_nucleus.core.kernels import KernelConfig
from megatron_nucleus.core.models.presets import ModelConfig
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.precision.precision import PrecisionConfig
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.training import arguments
from megatron_nucleus.training.benchmark.benchmark import InputConfig, randomise_zeros
from megatron_nucleus.training.benchmark.breakdown import Step, draw_noise
from megatron_nucleus.training.benchmark.parts import Timed, call_ours
from megatron_nucleus.training.benchmark.setup import load_run, prepare
from megatron_nucleus.training.initialize import end_rank
from megatron_nucleus.training.profiling.profile import (
    ProfileConfig,
    describe,
    profile_step,
    start_up_check,
)
from megatron_nucleus.utils import cli
from megatron_nucleus.utils import config as cfg


@dataclasses.dataclass(frozen=True)
class Flags:
    """Sections whose flags this program takes; a configuration file may hold all sections of a training run."""

    profile: ProfileConfig
    inputs: InputConfig
    model: ModelConfig
    training: arguments.TrainingConfig
    data: DataConfig
    encoders: EncoderConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    kernels: KernelConfig
    precision: PrecisionConfig


@dataclasses.dataclass(frozen=True)
class ProfileOnly:
    """The sections that a training run does not have."""

    profile: ProfileConfig
    inputs: InputConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = cfg.Parser(prog="tools/profile_train.py", description=__doc__)
    cli.add_json_flag(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of a training run; flags override it")
    cfg.add_arguments(parser, Flags)
    args = parser.parse_args(argv)
    run, only = load_run(args, ProfileOnly)
    result = profile_run(run, only)
    if not result:  # another rank's
        return
    describe(result, only.profile)
    if args.json:
        cli.print_json(result)


def profile_run(run: arguments.RunConfig, only: ProfileOnly) -> dict:
    """Build the model of ``run`` and profile its step; rank 0 returns `profile_step`'s object, others an empty one."""
    start_up_check(only.profile)
    model, work, parallel = prepare(run, only.inputs)
    randomise_zeros(model)
    step = Step(
        Timed(model, functools.partial(call_ours, model, work), work),
        build_optimizer(model, run.optimizer),
        run.optimizer.clip_grad,
        draw_noise(work, model),
        dist.group.WORLD if parallel.world > 1 else None,
        compiled=run.parallel.compile_blocks,
    )
    result = profile_step(step, only.profile, parallel.device, parallel.rank)
    return result if parallel.rank == 0 else {}


if __name__ == "__main__":
    cli.run(main)
    end_rank()
