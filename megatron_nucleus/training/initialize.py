"""From a checked configuration to a device, a run folder, a model and its encoders."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import subprocess
from pathlib import Path

import torch
import yaml

import megatron_nucleus
from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape, resolve_shape
from megatron_nucleus.data.encoders import build_codec, build_text_encoder
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.devices import pick_device
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_atomic

log = logging.getLogger(__name__)

# What may not change within a run: everything that would make "the same run" a different one.
# (section, key) pairs; a changed value needs a new --run-dir.
FROZEN_KEYS = (("training", "seed"), ("data", "resolution_px"))
FROZEN_SECTIONS = ("model", "encoders", "flow")


def initialize(run: RunConfig) -> torch.device:
    """Choose the device, set threads, refuse a launch that this version cannot serve, open the run folder."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != 1:
        raise ConfigError(
            f"WORLD_SIZE={world}: this version trains on one process; start tools/train.py without torchrun"
        )
    device = pick_device(run.training.device)
    if run.training.cpu_threads is not None:
        torch.set_num_threads(run.training.cpu_threads)
    open_run_folder(run)
    return device


def build_model(run: RunConfig, device: torch.device, text_dim: int) -> NucleusTransformer:
    """A freshly initialised model on ``device``, fp32, in training mode."""
    shape = run_shape(run, text_dim)
    kernels = resolve_kernels(run.kernels, device.type)
    return NucleusTransformer(shape, kernels, seed=run.training.seed).to(device).train()


def run_shape(run: RunConfig, text_dim: int) -> ModelShape:
    """The architecture, its text width taken from the text encoder unless the configuration names one."""
    config = run.model
    if config.text_dim is None:
        config = dataclasses.replace(config, text_dim=text_dim)
    elif config.text_dim != text_dim:
        raise ConfigError(
            f"--text-dim {config.text_dim}: the text encoder '{run.encoders.text_encoder}' gives {text_dim}"
        )
    return resolve_shape(config)


def build_encoders(run: RunConfig, encoded: dict | None, device: torch.device) -> tuple:
    """Codec and text encoder of the run; on stored features their specs must be those they were made with.

    Args:
        encoded: the manifest's ``encoded`` entry of a folder with stored features, or None.

    Raises:
        ConfigError: the run's encoders are not those of the stored features.
    """
    codec_spec, text_spec = run.encoders.codec_spec(), run.encoders.text_spec()
    codec, text_encoder = build_codec(codec_spec, device), build_text_encoder(text_spec, device)
    if encoded is not None:
        for option, ours in (("codec", codec.spec()), ("text_encoder", text_encoder.spec())):
            if encoded[option] != ours:
                raise ConfigError(
                    f"--data-path holds features of {option} {encoded[option]}, the run is configured for {ours}; "
                    "encode again or change the encoders section"
                )
        if encoded["resolution_px"] != run.data.resolution_px:
            raise ConfigError(
                f"--resolution-px {run.data.resolution_px}: the stored features were made at {encoded['resolution_px']}"
            )
    return codec, text_encoder


def open_run_folder(run: RunConfig) -> None:
    """Create the run folder and save the resolved configuration; on resume check that it is still the same run.

    Raises:
        ConfigError: the folder belongs to a run with other frozen settings, or cannot be written.
        DataError: its config.yaml cannot be read.
    """
    folder = run.training.run_dir
    path = folder / "config.yaml"
    resolved = cfg.to_dict(run)
    if path.is_file():
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}); restore it or use a new --run-dir"
            ) from error
        _check_same_run(saved, resolved, folder)
    document = {"config": resolved, "git_commit": git_commit(), "versions": versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise ConfigError(f"--run-dir {folder}: cannot be written ({error.strerror})") from error


def _check_same_run(saved: dict, resolved: dict, folder: Path) -> None:
    keys = [*FROZEN_KEYS, *((s, k) for s in FROZEN_SECTIONS for k in resolved[s])]
    for section, key in keys:
        before, now = saved.get(section, {}).get(key), resolved[section][key]
        if before != now:
            raise ConfigError(
                f"--run-dir {folder} holds a run with {section}.{key} = {before}, now it is {now}; "
                f"keep {before} to resume it or choose another --run-dir"
            )


def git_commit() -> str | None:
    """Commit of the source tree this package was imported from, with ``-dirty`` if changed; None outside git."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(megatron_nucleus.__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    return {
        "megatron_nucleus": megatron_nucleus.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
