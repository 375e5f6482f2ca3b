"""From a checked configuration to a rank among ranks, a model spread over them, and its encoders."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape, resolve_shape
from megatron_nucleus.core.optimizer.optimizer import STORED_DTYPES
from megatron_nucleus.core.parallel_state import ParallelState, create_groups, make_layout, single_process
from megatron_nucleus.core.parallelize import materialise, parallelize
from megatron_nucleus.core.precision.precision import apply_precision
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.data.encoders import (
    LatentCodec,
    TextEncoder,
    build_codec,
    build_text_encoder,
    same_encoder,
)
from megatron_nucleus.data.samples import load_samples
from megatron_nucleus.training.arguments import RunConfig, batch_split
from megatron_nucleus.utils.devices import pick_device
from megatron_nucleus.utils.errors import ConfigError

# torch's own timeout comes after the watchdog's, which can say who is missing.
_GRACE_S = 120.0
# bf16 gradients are summed over micro-batches in bf16, each addition rounded to nearest. Relative error of the sum
# beside fp32's, demo model: 0.3 % for 8, 0.6 % for 32, 1.3 % for 128 (`benchmarks/bf16_weights.json`). With as many
# equal gradients as bf16 has steps to a doubling, 128, sums also shrink.
MAX_BF16_ACCUMULATION = 64
_LAUNCH = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun and examples/slurm


class Encoders(NamedTuple):
    """The frozen encoders of a run.

    codec, text_encoder: None where stored features and no previews leave them nothing to do.
    codec_spec, text_spec: what rebuilds them. latent_channels, text_dim: what they give.
    stride_px: pixels per latent row and column; None where the spec of a codec that was not built does not say.
    """

    codec: LatentCodec | None
    text_encoder: TextEncoder | None
    codec_spec: dict
    text_spec: dict
    latent_channels: int
    text_dim: int
    stride_px: int | None


def initialize(run: RunConfig) -> ParallelState:
    """Choose the device, set threads, join the other ranks and cut the groups.

    Environment, as torchrun sets it: WORLD_SIZE (absent = one process), RANK, LOCAL_RANK (the GPU's number),
    MASTER_ADDR and MASTER_PORT. A process group that exists already is used as it is.

    Raises:
        ConfigError: parallel sizes that do not fit the number of ranks, an incomplete environment, or bf16 weights
            without bf16 arithmetic or with more micro-batches than bf16 gradients can sum.
    """
    t, p = run.training, run.parallel
    if t.cpu_threads is not None:
        torch.set_num_threads(t.cpu_threads)
    world = environment_number("WORLD_SIZE", 1)
    experts = resolve_shape(run.model).num_experts
    layout = make_layout(
        world, experts=experts, ep=p.expert_model_parallel_size, replicate=p.data_parallel_replicate_size
    )
    _check_accumulation(run, batch_split(run, world)[1])
    local_rank = environment_number("LOCAL_RANK", 0)
    device = pick_device(t.device)
    if world == 1:
        return single_process(device, experts)
    if device.type == "cuda" and device.index is None:
        device = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(device)
    timeout_s = 60.0 * p.distributed_timeout_minutes + _GRACE_S
    if not dist.is_initialized():
        _join(device, timeout_s)
    return create_groups(layout, device, local_rank, timeout_s)


def _check_accumulation(run: RunConfig, accumulation: int) -> None:
    """Whether gradients can be summed in the dtype of the weights."""
    if run.optimizer.master_weights == "bf16" and accumulation > MAX_BF16_ACCUMULATION:
        raise ConfigError(
            f"--master-weights bf16: a rank would sum {accumulation} micro-batches in bf16, where small addends get "
            f"lost; at most {MAX_BF16_ACCUMULATION}: give a larger --micro-batch-size, more ranks, or fp32"
        )


def _join(device: torch.device, timeout_s: float) -> None:
    missing = [name for name in _LAUNCH if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}: start several ranks with torchrun "
            "or with a script of examples/slurm"
        )
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
    )


def end_rank() -> None:
    """End this process with exit code 0 if it is one of several ranks; the last thing a program calls.

    Threads of gloo let go of their last tensors a moment after a collective has returned. One that does so while
    Python shuts down aborts the process (torch up to 2.13, pytorch/pytorch#190489), and the launcher takes a
    finished run for a failed one. So nothing is shut down.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def environment_number(name: str, default: int) -> int:
    """A number from the launcher's environment; ConfigError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise ConfigError(f"{name}={value}: the launcher must set it to a number")
    return int(value)


def build_model(run: RunConfig, parallel: ParallelState, encoders: Encoders) -> NucleusTransformer:
    """A freshly initialised model, in training mode, spread over the ranks; each allocates what it holds.

    Parameters are stored as ``optimizer.master_weights`` says, and so are their gradients.

    Raises:
        ConfigError: the encoders do not fit the model.
    """
    shape = run_shape(run, encoders.text_dim)
    if shape.latent_channels != encoders.latent_channels:
        raise ConfigError(
            f"--latent-channels {shape.latent_channels}: the codec '{encoders.codec_spec['name']}' gives "
            f"{encoders.latent_channels}"
        )
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    kernels = resolve_kernels(run.kernels, parallel.device.type, shape, dtype)
    with torch.device("meta"):
        model = NucleusTransformer(shape, kernels)
    model.to(STORED_DTYPES[run.optimizer.master_weights])
    apply_precision(
        model,
        run.precision,
        device_type=parallel.device.type,
        bf16=run.training.bf16,
        recomputes=run.parallel.recompute_granularity != "none",
        compiles=run.parallel.compile_blocks,
        expert_ffn_backend=run.kernels.expert_ffn_backend,
    )
    parallelize(model, run.parallel, parallel, bf16=run.training.bf16)
    materialise(model, parallel.device, run.training.seed)
    return model.train()


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


def build_encoders(run: RunConfig, corpus: Corpus, device: torch.device) -> Encoders:
    """Codec and text encoder of the run. On stored features they are built for previews alone.

    Raises:
        ConfigError: the run's encoders, resolution or patch are not those of the stored features.
        DataError: a damaged encoder folder, or stored features that cannot be read.
    """
    codec_spec, text_spec = run.encoders.codec_spec(), run.encoders.text_spec()
    if corpus.encoded is not None:
        _check_stored(run, corpus.encoded, codec_spec, text_spec)
        codec_spec = _completed(codec_spec, corpus.encoded["codec"])
        text_spec = _completed(text_spec, corpus.encoded["text_encoder"])
        if not run.training.sample_interval:
            channels, text_dim = _stored_widths(run, corpus)
            return Encoders(
                None, None, codec_spec, text_spec, channels, text_dim, codec_spec.get("stride_px")
            )
    codec, text_encoder = build_codec(codec_spec, device), build_text_encoder(text_spec, device)
    return Encoders(
        codec,
        text_encoder,
        codec.spec(),
        text_encoder.spec(),
        codec.channels,
        text_encoder.dim,
        codec.stride_px,
    )


def _check_stored(run: RunConfig, encoded: dict, codec_spec: dict, text_spec: dict) -> None:
    for option, ours in (("codec", codec_spec), ("text_encoder", text_spec)):
        if not same_encoder(encoded[option], ours):
            raise ConfigError(
                f"--data-path holds features of {option} {encoded[option]}, the run is configured for {ours}; "
                "encode again or change the encoders section"
            )
    patch_size = resolve_shape(run.model).patch_size
    for flag, ours, key in (
        ("--resolution-px", run.data.resolution_px, "resolution_px"),
        ("--patch-size", patch_size, "patch_size"),
    ):
        if encoded.get(key, ours) != ours:
            raise ConfigError(f"{flag} {ours}: the stored features were made for {encoded[key]}")


def _completed(configured: dict, stored: dict) -> dict:
    """The stored spec, with what the configuration says of where the encoder lies and how it is run."""
    return {**stored, **{key: value for key, value in configured.items() if value is not None}}


def _stored_widths(run: RunConfig, corpus: Corpus) -> tuple[int, int]:
    """(latent channels, text width) of stored features, from one sample."""
    raw = load_samples(corpus, [0], [0], run.data.resolution_px)
    return raw.latents_BCHW.shape[1], raw.text.features_BLU.shape[2]
