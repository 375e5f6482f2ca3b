"""From a training configuration to a model and a random batch that can be timed or profiled, on every rank."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from megatron_nucleus.core.kernels import Kernels, sizes_of
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import resolve_shape
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import build_loader
from megatron_nucleus.ops import registry
from megatron_nucleus.training import arguments, flops
from megatron_nucleus.training.benchmark.benchmark import BenchConfig, InputConfig, make_workload
from megatron_nucleus.training.benchmark.parts import Workload
from megatron_nucleus.training.initialize import Encoders, build_encoders, build_model, initialize
from megatron_nucleus.training.planning.images import square_grid
from megatron_nucleus.training.planning.ledger import MicroBatch
from megatron_nucleus.training.planning.memory import Work
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import Origins, read_yaml
from megatron_nucleus.utils.errors import ConfigError

# Without a configuration file: the embedded task's size, which takes seconds on a CPU.
DEFAULTS = {"data": {"resolution_px": 32}}


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


def prepare(run: arguments.RunConfig, inputs: InputConfig) -> Prepared:
    """Build the model of ``run`` on this rank and a random micro-batch for it.

    Raises:
        ConfigError: settings that do not fit each other or this machine.
    """
    if isinstance(inputs, BenchConfig) and inputs.compare:
        _check_fair(run, inputs)
    parallel = initialize(run)
    shape = resolve_shape(run.model)
    micro_batch_size, accumulation = arguments.batch_split(run, parallel.world)
    work = make_workload(
        shape,
        inputs,
        square_grid(run, inputs.grid, shape),
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        bf16=run.training.bf16,
        device=parallel.device,
    )
    # Random inputs need no encoders, only the widths that encoders would give.
    encoders = Encoders(None, None, {}, {}, shape.latent_channels, shape.text_dim, None)
    return Prepared(build_model(run, parallel, encoders), work, parallel)


def _check_fair(run: arguments.RunConfig, bench: BenchConfig) -> None:
    """Refuse a comparison in which one of the two modules does something that the other does not."""
    unfair = (
        (
            run.precision.fp8 != "none",
            f"the other module does not compute in FP8; leave out --fp8 {run.precision.fp8}",
        ),
        (
            run.parallel.compile_blocks and not bench.compare_compile,
            "with --compile-blocks the other module needs its blocks compiled, too: add --compare-compile",
        ),
        (
            bench.compare_checkpointing and run.parallel.recompute_granularity == "none",
            "with --compare-checkpointing ours must recompute, too: add --recompute-granularity full",
        ),
    )
    for found, reason in unfair:
        if found:
            raise ConfigError(f"--compare {bench.compare}: {reason}")


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


def peak_of(run: arguments.RunConfig, parallel: ParallelState) -> tuple[float | None, str | None]:
    """(FLOP/s of one device that MFU is measured against, whose they are); (None, None) where unknown.

    With FP8 layers it stays the peak of bf16, so that MFU tells what they gain.
    """
    given = run.training.peak_tflops
    if given:
        return given * 1e12, "--peak-tflops"
    dtype, word = (torch.bfloat16, "bf16") if run.training.bf16 else (torch.float32, "fp32")
    peak = flops.device_peak_flops(parallel.device, dtype)
    return peak, None if peak is None else f"data sheet, {word} without sparsity"


def hardware_flops_of(
    run: arguments.RunConfig, bench: BenchConfig, work: Workload, parallel: ParallelState
) -> int:
    """Products of the timed step (`flops.hardware_flops`): those of the rank that forms most, times the ranks."""
    images, tokens, _ = work.latents_BSP.shape
    planned = Work(
        resolve_shape(run.model),
        parallel.layout,
        MicroBatch(images, tokens, bench.text_tokens),
        work.accumulation,
        run.training.bf16,
        run.parallel.recompute_granularity,
        optimizer=run.optimizer.optimizer,
        ns_steps=run.optimizer.muon_num_ns_steps,
        device_type=parallel.device.type,
    )
    parts = flops.hardware_flops(planned)
    left_out = ("backward", "recompute", "optimizer") if bench.forward_only else ("optimizer",)
    if not bench.with_optimizer:
        parts = {name: count for name, count in parts.items() if name not in left_out}
    return parallel.world * sum(parts.values())


def backends_of(run: arguments.RunConfig, parallel: ParallelState) -> dict[str, str]:
    """Which backend runs each operation of the model, by the choice that `build_model` makes."""
    facts = {
        "device_type": parallel.device.type,
        "dtype": torch.bfloat16 if run.training.bf16 else torch.float32,
        "sizes": sizes_of(resolve_shape(run.model)),
    }
    names = [field.name for field in dataclasses.fields(Kernels)]
    return {
        name: registry.choose(name, getattr(run.kernels, f"{name}_backend"), **facts).backend
        for name in names
    }


def dtype_of(run: arguments.RunConfig) -> str:
    """In what the step computes, as its row names it."""
    word = "bf16" if run.training.bf16 else "fp32"
    precision = run.precision
    return word if precision.fp8 == "none" else f"{word}, {precision.fp8} fp8 {precision.fp8_recipe}"
