"""Every setting of a training run: the sections, each declared beside the code that reads it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_nucleus.core.flow import FlowConfig
from megatron_nucleus.core.kernels import KernelConfig
from megatron_nucleus.core.models.presets import ModelConfig
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig
from megatron_nucleus.core.optimizer.schedule import ScheduleConfig
from megatron_nucleus.core.parallel_state import ParallelConfig
from megatron_nucleus.core.precision.precision import PrecisionConfig
from megatron_nucleus.data.curriculum import CurriculumConfig
from megatron_nucleus.data.encoders import EncoderConfig
from megatron_nucleus.data.loader import DataConfig
from megatron_nucleus.inference.sampler import SamplerConfig
from megatron_nucleus.training.losses import LossConfig
from megatron_nucleus.training.validation import ValidationConfig
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run: length, batch, precision, what is written and when."""

    run_dir: Path = knob(Path("runs/train"), "folder of the run; the same command again resumes it")
    train_steps: int = knob(1000, "stop after this many optimizer steps in total", unit="steps")
    global_batch_size: int = knob(64, "images per optimizer step over all ranks", unit="images")
    micro_batch_size: int | None = knob(
        None, "images per forward pass on a rank; None = no accumulation", unit="images"
    )
    seed: int = knob(0, "of weights, sample order, noise, noise levels and captions")
    device: str = knob("auto", "auto, cpu or cuda")
    bf16: bool = knob(
        False, "compute in bfloat16 (autocast); what is stored: --master-weights and --state-dtype"
    )
    cpu_threads: int | None = knob(None, "threads of one operation on a CPU; None = torch's choice")
    log_interval: int = knob(10, "write metrics every so many steps", unit="steps")
    save_interval: int = knob(
        500, "write a checkpoint every so many steps; 0 = only at the end", unit="steps"
    )
    sample_interval: int = knob(0, "draw preview pictures every so many steps; 0 = never", unit="steps")
    sample_prompts: tuple[str, ...] = knob((), "prompts of the preview pictures")
    keep_last_checkpoints: int | None = knob(None, "delete older checkpoints than these; None keeps all")
    tensorboard: bool = knob(True, "write TensorBoard event files")
    exit_duration_in_mins: float | None = knob(
        None, "save and stop (exit code 4) after this long", unit="minutes"
    )
    async_save: bool = knob(False, "write checkpoints beside the training, from a copy in host memory")
    init_from: Path | None = knob(
        None,
        "checkpoint whose weights a new run starts from: a run (its newest), step, merged or diffusers folder",
    )
    init_optimizer: bool = knob(False, "start from the optimizer state of --init-from, too")
    keep_last_weights: int | None = knob(
        None,
        "of checkpoints beyond --keep-last-checkpoints keep so many with their weights alone, for merging",
    )
    routing_interval: int = knob(
        0, "log routing figures and histograms every so many steps; 0 = never", unit="steps"
    )
    max_skipped_in_a_row: int = knob(10, "stop after so many skipped steps in a row", unit="steps")
    loss_spike_factor: float | None = knob(
        20.0, "skip a step in which a rank's loss exceeds the running mean by this factor; none = never"
    )
    peak_tflops: float | None = knob(
        None, "device peak for MFU; None = the table's, if it knows it", unit="TFLOP/s"
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All sections of a run, in the order of `--help`."""

    training: TrainingConfig
    model: ModelConfig
    data: DataConfig
    curriculum: CurriculumConfig
    encoders: EncoderConfig
    flow: FlowConfig
    losses: LossConfig
    validation: ValidationConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    sampling: SamplerConfig
    parallel: ParallelConfig
    kernels: KernelConfig
    precision: PrecisionConfig


def batch_split(run: RunConfig, world: int) -> tuple[int, int]:
    """(images of one forward pass on a rank, forward passes per optimizer step) for ``world`` ranks.

    Raises:
        ConfigError: the global batch is no multiple of micro-batch x ranks, or smaller pieces than chunks.
    """
    total, micro = run.training.global_batch_size, run.training.micro_batch_size
    if total % ((micro or 1) * world):
        of_what = f"--micro-batch-size {micro} x {world} ranks" if micro else f"the {world} ranks"
        raise ConfigError(f"--global-batch-size {total}: must be a multiple of {of_what}")
    micro = micro or total // world
    chunks = run.parallel.moe_overlap_chunks
    if run.parallel.expert_model_parallel_size > 1 and micro < chunks:
        raise ConfigError(
            f"--moe-overlap-chunks {chunks}: a rank's micro-batch has {micro} images; at most so many chunks"
        )
    return micro, total // (micro * world)


def parse_run(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser
) -> tuple[RunConfig, argparse.Namespace]:
    """Add every section's flags to ``parser``, parse, merge with ``--config`` and check.

    The namespace gets ``origins``, which file gave which value, for the messages of later checks.

    Raises:
        ConfigError: see `utils.config.load` and `check`.
    """
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with sections as below; flags override it"
    )
    cfg.add_arguments(parser, RunConfig)
    args = parser.parse_args(argv)
    run, args.origins = cfg.load_named(RunConfig, args, args.config)
    with args.origins.named():
        check(run)
    return run, args


def check(run: RunConfig) -> None:
    """Refuse settings that do not fit each other, before anything is built.

    Raises:
        ConfigError: names the flag, its value and what is allowed.
    """
    t = run.training
    for name in ("train_steps", "global_batch_size", "log_interval", "max_skipped_in_a_row"):
        _at_least(name, getattr(t, name), 1)
    for name in ("save_interval", "sample_interval", "routing_interval"):
        _at_least(name, getattr(t, name), 0)
    if t.micro_batch_size is not None:
        _at_least("micro_batch_size", t.micro_batch_size, 1)
        if t.global_batch_size % t.micro_batch_size:
            raise ConfigError(
                f"--micro-batch-size {t.micro_batch_size} does not divide --global-batch-size {t.global_batch_size}"
            )
    if not -(1 << 63) <= t.seed < 1 << 63:
        raise ConfigError(f"--seed {t.seed}: must be a signed 64-bit number")
    if t.cpu_threads is not None:
        _at_least("cpu_threads", t.cpu_threads, 1)
    if t.keep_last_checkpoints is not None:
        _at_least("keep_last_checkpoints", t.keep_last_checkpoints, 1)
    if t.keep_last_weights is not None:
        _at_least("keep_last_weights", t.keep_last_weights, 1)
        if t.keep_last_checkpoints is None:
            raise ConfigError(
                f"--keep-last-weights {t.keep_last_weights}: is for checkpoints older than --keep-last-checkpoints N; "
                "give N as well"
            )
    if run.optimizer.master_weights == "bf16" and not t.bf16:
        raise ConfigError("--master-weights bf16: bf16 weights are multiplied in bf16; give --bf16, too")
    if t.init_optimizer and t.init_from is None:
        raise ConfigError(
            "--init-optimizer: needs --init-from, the checkpoint whose optimizer state it takes"
        )
    if t.sample_interval and not t.sample_prompts:
        raise ConfigError(
            "--sample-interval needs --sample-prompts (or training.sample_prompts in the config file)"
        )
    if not 0 <= run.flow.sigma_uniform_frac <= 1:
        raise ConfigError(f"--sigma-uniform-frac {run.flow.sigma_uniform_frac}: must lie in [0, 1]")
    if not run.flow.sigma_std > 0:
        raise ConfigError(f"--sigma-std {run.flow.sigma_std}: must be positive")
    if run.flow.sigma_tokens_low == run.flow.sigma_tokens_high:
        raise ConfigError(f"--sigma-tokens-low and --sigma-tokens-high are both {run.flow.sigma_tokens_low}")
    if t.loss_spike_factor is not None and not t.loss_spike_factor > 1:
        raise ConfigError(f"--loss-spike-factor {t.loss_spike_factor}: must be above 1, or none")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
