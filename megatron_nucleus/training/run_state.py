"""What a checkpoint carries beside tensors, and what must agree when it is loaded."""

from __future__ import annotations

import dataclasses
import logging

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.planner import PLAN_VERSION
from megatron_nucleus.inference.pipeline import check_size
from megatron_nucleus.inference.sampler import SamplerConfig, check_sampler
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.training.initialize import Encoders
from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError
from megatron_nucleus.utils.revision import git_commit

log = logging.getLogger(__name__)


def sampling_settings(run: RunConfig) -> SamplerConfig:
    """How this run's pictures are drawn: where the configuration is silent, at the training resolution."""
    sizes = {name: getattr(run.sampling, name) for name in ("height", "width")}
    sizes = {name: run.data.resolution_px if size is None else size for name, size in sizes.items()}
    return dataclasses.replace(run.sampling, **sizes)


def check_sampling(run: RunConfig, shape: ModelShape, encoders: Encoders) -> None:
    """Refuse sampling settings that can draw nothing, before a checkpoint carries them.

    Raises:
        ConfigError: a value out of range, or a size that codec stride and patch do not divide.
    """
    config = sampling_settings(run)
    check_sampler(config)
    if encoders.stride_px is not None:
        for name in ("height", "width"):
            check_size(name, getattr(config, name), encoders.stride_px * shape.patch_size)


def checkpoint_extra(run: RunConfig, shape: ModelShape, encoders: Encoders, corpus: Corpus) -> dict:
    """The entries of ``state.json`` that do not change while the run goes on."""
    return {
        "seed": run.training.seed,
        "model": dataclasses.asdict(shape),
        "codec": encoders.codec_spec,
        "text_encoder": encoders.text_spec,
        "sampling": dataclasses.asdict(sampling_settings(run)),
        "data": {
            "manifest_hash": corpus.manifest_hash,
            "held_out_samples": len(corpus.held_out),
            "plan_version": PLAN_VERSION,
        },
        "git_commit": git_commit(),
        "versions": versions(),
    }


def restore(state: TrainState, saver: Checkpointer, run: RunConfig, corpus: Corpus) -> dict | None:
    """Fill ``state`` from the newest checkpoint; its other entries of ``state.json``, None if there is none yet.

    Raises:
        ConfigError: the checkpoint was trained on other data, or lies beyond ``train_steps``.
        DataError: the checkpoint is damaged.
    """
    extra = saver.load_latest(state)
    if extra is None:
        return None
    before = extra["data"]["manifest_hash"]
    if before != corpus.manifest_hash:
        raise ConfigError(
            f"--data-path {run.data.data_path}: manifest {corpus.manifest_hash[:12]} is not the one this run was "
            f"trained on ({before[:12]}), so its sample order would change; use that data or a new --run-dir"
        )
    if (version := extra["data"].get("plan_version")) != PLAN_VERSION:
        raise ConfigError(
            f"--run-dir {run.training.run_dir}: its samples were drawn by plan version {version}, this program draws "
            f"by version {PLAN_VERSION}; finish it with the version it began with, or start a new --run-dir with "
            "--init-from"
        )
    held_out = extra["data"].get("held_out_samples", 0)
    if held_out != len(corpus.held_out):
        raise ConfigError(
            f"--valid-samples {len(corpus.held_out)}: this run holds out {held_out} images, so its sample order "
            f"would change; use {held_out} or a new --run-dir"
        )
    if state.step > run.training.train_steps:
        raise ConfigError(
            f"--train-steps {run.training.train_steps}: the run in {run.training.run_dir} is already at step "
            f"{state.step}; give at least {state.step}, or another --run-dir"
        )
    log.info("resumed at step %d (%d samples seen)", state.step, state.samples_seen)
    return extra
