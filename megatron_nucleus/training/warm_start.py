"""A new run that starts from a checkpoint of an earlier one: the next stage of a recipe, or a fine-tuning."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.core.parallelize import held_rows
from megatron_nucleus.data.encoders import same_encoder
from megatron_nucleus.export import native
from megatron_nucleus.export.source import CheckpointDescription, Weights, open_checkpoint
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.checkpointing.agreement import Ranks
from megatron_nucleus.training.checkpointing.checkpointer import check_stored
from megatron_nucleus.training.checkpointing.shard_files import read_tensors
from megatron_nucleus.training.initialize import Encoders
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError, UserError
from megatron_nucleus.utils.tensors import local

log = logging.getLogger(__name__)

# What may differ between stages: it changes no parameter and no meaning of one.
STAGE_KEYS = ("capacity_factors",)


def start_from(state: TrainState, run: RunConfig, encoders: Encoders, parallel: ParallelState) -> dict:
    """Fill the weights of ``state`` (and its optimizer, if asked for) from ``training.init_from``.

    Each rank reads the rows that it holds, whatever ranks wrote them. The clock of the new run starts at 0.

    Returns:
        what the run's checkpoints say of it (``started_from`` in state.json): path, step, samples seen by all
        stages so far, SHA-256 of the manifest, whether the optimizer was taken over, and the source's own
        ``started_from``.

    Raises:
        ConfigError: nothing there, another architecture (but for `STAGE_KEYS`), other encoders, or no optimizer
            state where it is asked for.
        DataError: damaged files.
    """
    path, ranks = run.training.init_from, Ranks(parallel.control)
    try:
        ranks.on_first(lambda: open_checkpoint(path, checksums=True))  # one rank compares checksums for all
        description, weights = open_checkpoint(path, checksums=False)
        _check_same(description, state.model.shape, encoders)
        ranks.on_all(lambda: _fill(state.model, weights))
        if run.training.init_optimizer:
            _fill_optimizer(state, description, ranks)
    except UserError as error:
        raise type(error)(f"--init-from {path}: {error}") from error
    if parallel.rank == 0 and description.provenance.get("seed") == run.training.seed:
        log.warning(
            "--seed %d: %s was trained with it, too, so where the data is the same, the same images come in the same "
            "order with the same noise again; give another --seed",
            *(run.training.seed, description.path),
        )
    log.info("starts from %s%s", description.path, " with its optimizer" * run.training.init_optimizer)
    return _lineage(description, run.training.init_optimizer)


def _check_same(description: CheckpointDescription, shape: ModelShape, encoders: Encoders) -> None:
    ours, theirs = native.shape_to_dict(shape), native.shape_to_dict(description.shape)
    for key in ours:
        if ours[key] == theirs[key]:
            continue
        if key not in STAGE_KEYS:
            raise ConfigError(
                f"it was trained with model.{key} = {theirs[key]}, this run is configured for {ours[key]}; a stage "
                f"may change {', '.join(STAGE_KEYS)} only"
            )
        log.info("model.%s: %s before, %s from here on", key, theirs[key], ours[key])
    for what, spec in (("codec", encoders.codec_spec), ("text_encoder", encoders.text_spec)):
        stored = getattr(description, what)
        if stored is not None and not same_encoder(stored, spec):
            raise ConfigError(f"it was trained with the {what} {stored}, this run is configured for {spec}")


@torch.no_grad()
def _fill(model: torch.nn.Module, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        start, stop = held_rows(parameter)
        if start < stop:
            local(parameter).copy_(weights.read_rows(name, start, stop))


def _fill_optimizer(state: TrainState, description: CheckpointDescription, ranks: Ranks) -> None:
    folder = description.path
    if description.kind != "native" or not native.holds_optimizer(folder):
        raise ConfigError(
            f"{folder} holds no optimizer state (merged, exported and weights-only folders have none); leave "
            "--init-optimizer out, or name a step folder that has one"
        )
    stored = ranks.on_first(lambda: native.read_state(folder))
    tensors = state.optimizer.tensors()
    ranks.on_first(lambda: _verify_optimizer(folder))
    ranks.on_first(lambda: check_stored(folder, "optimizer", tensors))
    read_tensors(ranks, tensors, folder / "optimizer")
    state.optimizer.load_scalars(stored["optimizer"])


def _verify_optimizer(folder: Path) -> None:
    try:
        native.verify(folder, ("optimizer/",))
    except DataError as error:
        raise DataError(f"{error}; {native.advice(folder)}, or leave --init-optimizer out") from error


def _lineage(description: CheckpointDescription, with_optimizer: bool) -> dict:
    stored = description.provenance
    before = stored.get("started_from")
    earlier = before["samples_seen_in_all"] if before else 0
    manifest = Path(description.path) / "manifest.json"
    return {
        "path": str(description.path.absolute()),
        "step": description.step,
        "samples_seen_in_all": earlier + (stored.get("samples_seen") or 0),
        "manifest_sha256": native.describe_file(manifest)["sha256"] if manifest.is_file() else None,
        "optimizer": with_optimizer,
        "started_from": before,
    }
