"""Build a model from a checkpoint folder, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_nucleus.core.kernels import Kernels, resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.export import source
from megatron_nucleus.export.source import CheckpointDescription, Weights, open_checkpoint
from megatron_nucleus.utils.errors import ConfigError, DataError


def read_description(path: str | Path) -> CheckpointDescription:
    """What a checkpoint is (architecture, encoders, sampling defaults, step) without reading its weights.

    Raises:
        ConfigError: nothing there that could be a checkpoint.
        DataError: its description is missing or damaged.
    """
    return source.describe(path)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    kernels: Kernels | None = None,
    checksums: bool = True,
) -> NucleusTransformer:
    """Load a model in eval mode. Memory: the model plus its largest tensor.

    Args:
        path: run folder, checkpoints folder, one checkpoint, a merged folder, or a diffusers folder or pipeline.
        device: where the parameters go.
        dtype: floating type to convert to; None keeps what is stored.
        kernels: operations to run on; None resolves the best for ``device``.
        checksums: compare SHA-256 of native files before use (one extra read); sizes are always compared.

    Raises:
        ConfigError: nothing there that could be a checkpoint, or ``dtype`` is not floating.
        DataError: a file or tensor is missing, truncated, altered, unexpected or of the wrong shape.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            f"dtype {dtype}: weights need a floating type such as torch.float32 or torch.bfloat16"
        )
    description, weights = open_checkpoint(path, checksums)
    kernels = kernels or resolve_kernels(
        device_type=torch.device(device).type, shape=description.shape, dtype=dtype
    )
    with torch.device("meta"):
        model = NucleusTransformer(description.shape, kernels=kernels)
    _check_names(model, weights)
    for name in weights.keys:
        owner, attribute = _owner(model, name)
        old = getattr(owner, attribute)
        value = weights.read(name).to(device=device, dtype=dtype)
        setattr(owner, attribute, nn.Parameter(value, requires_grad=old.requires_grad))
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, checksums: bool = True) -> CheckpointDescription:
    """Copy the weights of a checkpoint into an existing model of the same architecture, keeping its dtype and device.

    For fine-tuning and for starting a run from an exported folder.

    Raises:
        ConfigError: nothing there that could be a checkpoint.
        DataError: damaged files, or weights of another architecture (naming the first tensor that differs).
    """
    description, weights = open_checkpoint(path, checksums)
    parameters = _check_names(model, weights)
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != weights.info(name).shape:
            raise DataError(
                f"{weights.file(name)}: tensor {name} has shape {list(weights.info(name).shape)}, the model to fill "
                f"has {list(parameter.shape)}; give both the same architecture"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights.read(name))
    return description


def _check_names(model: nn.Module, weights: Weights) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    different = sorted(parameters.keys() ^ weights.keys.keys())
    if different:
        side = "the model" if different[0] in parameters else "the checkpoint"
        raise DataError(f"parameter {different[0]} exists only in {side}; give both the same architecture")
    return parameters


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
