"""From a training configuration to a model and a random batch that can be timed or profiled, on every rank."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape, resolve_shape
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import build_loader
from megatron_nucleus.training import arguments, flops
from megatron_nucleus.training.benchmark.benchmark import BenchConfig, make_workload
from megatron_nucleus.training.benchmark.parts import Workload
from megatron_nucleus.training.initialize import Encoders, build_encoders, build_model, initialize
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import Origins, read_yaml
from megatron_nucleus.utils.errors import ConfigError

# Without a configuration file: the embedded task's size, which takes seconds on a CPU.
DEFAULTS = {"data": {"resolution_px": 32}}
VAE_STRIDE_PX = 8  # of the Qwen-Image VAE, whose spec does not say it


class Prepared(NamedTuple):
    """What a measurement starts from."""

    model: NucleusTransformer
    work: Workload
    parallel: ParallelState


def load_run(args: argparse.Namespace, only: type) -> tuple[arguments.RunConfig, Any]:
    """Merge ``args.config`` and flags; ``data.data_path`` may be missing.

    Args:
        only: dataclass of the sections that a training run does not have, and no others.

    Returns:
        the training run's sections and an ``only``.
    """
    values, origins = read_yaml(args.config) if args.config else (DEFAULTS, Origins())
    values = values | {"data": {"data_path": "none"} | values.get("data", {})}
    where = str(args.config or "defaults")
    sections = only.__dataclass_fields__
    own = {k: v for k, v in values.items() if k in sections}
    rest = {k: v for k, v in values.items() if k not in sections}
    run = cfg.from_dict(arguments.RunConfig, rest, flags=vars(args), where=where, origins=origins)
    arguments.check(run)
    return run, cfg.from_dict(only, own, flags=vars(args), where=where)


def prepare(run: arguments.RunConfig, bench: BenchConfig) -> Prepared:
    """Build the model of ``run`` on this rank and a random micro-batch for it.

    Raises:
        ConfigError: settings that do not fit each other or this machine.
    """
    parallel = initialize(run)
    shape = resolve_shape(run.model)
    micro_batch_size, accumulation = arguments.batch_split(run, parallel.world)
    work = make_workload(
        shape,
        bench,
        grid_of(run, bench, shape),
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        bf16=run.training.bf16,
        device=parallel.device,
    )
    # Random inputs need no encoders, only the widths that encoders would give.
    encoders = Encoders(None, None, {}, {}, shape.latent_channels, shape.text_dim, None)
    return Prepared(build_model(run, parallel, encoders), work, parallel)


def grid_of(run: arguments.RunConfig, bench: BenchConfig, shape: ModelShape) -> tuple[int, int]:
    """Image tokens: ``--grid``, or the square of ``--resolution-px`` through codec and patch."""
    if bench.grid is not None:
        return (bench.grid[0], bench.grid[1])
    stride_px = run.encoders.codec_spec().get("stride_px", VAE_STRIDE_PX) * shape.patch_size
    if run.data.resolution_px % stride_px:
        raise ConfigError(
            f"--resolution-px {run.data.resolution_px}: must be a multiple of {stride_px} (codec stride x patch size)"
        )
    side = run.data.resolution_px // stride_px
    return (side, side)


@contextlib.contextmanager
def reading_data(run: arguments.RunConfig, parallel: ParallelState) -> Iterator[Callable[[], object]]:
    """What brings the next micro-batch of ``data.data_path`` through loader and encoders, as in training.

    The loader works ahead while a step runs, so a call takes what a step has to wait for it.

    Raises:
        ConfigError, DataError: data or encoders that cannot be used.
    """
    corpus = open_corpus(run.data.data_path, run.validation.valid_samples)
    encoders = build_encoders(run, corpus, parallel.device)
    shape = resolve_shape(run.model)
    extractor = FeatureExtractor(encoders.codec, encoders.text_encoder, shape.patch_size, parallel.device)
    loader = build_loader(
        run.data,
        corpus,
        curriculum=run.curriculum,
        seed=run.training.seed,
        global_batch_size=run.training.global_batch_size,
        accumulation=arguments.batch_split(run, parallel.world)[1],
        rank=parallel.rank,
        world=parallel.world,
        start_samples=0,
        multiple_px=extractor.multiple_px,
    )
    with loader:
        yield lambda: extractor.extract(next(loader))


def peak_flops_of(run: arguments.RunConfig, parallel: ParallelState) -> float | None:
    """FLOP/s of one device that MFU is measured against: the configured ones, or the table's; None = unknown."""
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    given = run.training.peak_tflops
    return given * 1e12 if given else flops.device_peak_flops(parallel.device, dtype)
