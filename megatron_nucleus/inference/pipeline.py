"""Prompts in, pictures out: a model with its frozen encoders and its sampling defaults."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megatron_nucleus.core.kernels import resolve_kernels
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.patches import pack, unpack
from megatron_nucleus.core.precision.expert_weights import CHOICES, quantise_experts
from megatron_nucleus.data.encoders import LatentCodec, TextEncoder, build_codec, build_text_encoder
from megatron_nucleus.export.load import CheckpointDescription, load_model, read_description
from megatron_nucleus.inference.sampler import (
    PUBLISHED,
    OnRouting,
    SamplerConfig,
    check_sampler,
    sample_latents,
)
from megatron_nucleus.inference.text import Job, TextMemory
from megatron_nucleus.types import TextFeatures, TextKV
from megatron_nucleus.utils import rng
from megatron_nucleus.utils.devices import pick_device
from megatron_nucleus.utils.errors import ConfigError, DataError

# Images whose prompts are encoded before the first of them is drawn: a prompt that is too long stops a job of
# any usual size at once, and the features of a window (1 MB per prompt with Qwen3-VL) fit in memory.
WINDOW_IMAGES = 1024
DECODE_PIXELS = 1 << 20  # pixels a codec decodes at once: a VAE needs gigabytes per megapixel


class Pipeline:
    """Text to image.

    Args:
        model: in any floating dtype; its device is where the sampling runs.
        codec, text_encoder: the frozen encoders the model was trained with (`data/encoders`).
        sampling: defaults of `generate`.

    Raises:
        ConfigError: encoders whose channels or width are not the model's.
    """

    def __init__(
        self,
        model: NucleusTransformer,
        codec: LatentCodec,
        text_encoder: TextEncoder,
        sampling: SamplerConfig,
    ):
        if codec.channels != model.shape.latent_channels:
            raise ConfigError(
                f"codec '{codec.name}' gives {codec.channels} latent channels, the model reads "
                f"{model.shape.latent_channels}; use the codec it was trained with"
            )
        if text_encoder.dim != model.shape.text_dim:
            raise ConfigError(
                f"text encoder '{text_encoder.name}' has width {text_encoder.dim}, the model reads "
                f"{model.shape.text_dim}; use the text encoder it was trained with"
            )
        self.model, self.codec, self.text_encoder, self.sampling = model, codec, text_encoder, sampling

    @property
    def size_unit_px(self) -> int:
        """Heights and widths must be multiples of this: codec stride x patch."""
        return self.codec.stride_px * self.model.shape.patch_size

    def settings(self, **overrides: int | float | None) -> SamplerConfig:
        """Sampling defaults with every override that is not None applied, checked.

        Raises:
            ConfigError: a value out of range, no size at all, or one that stride and patch do not divide.
        """
        given = {k: v for k, v in overrides.items() if v is not None}
        config = dataclasses.replace(self.sampling, **given)
        check_sampler(config)
        for name in ("height", "width"):
            check_size(name, getattr(config, name), self.size_unit_px)
        return config

    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> list[Image.Image]:
        """One picture per prompt, in order; see `stream`, whose arguments these are."""
        pictures = self.stream(
            prompts, negative_prompts=negative_prompts, height=height, width=width, steps=steps,
            guidance=guidance, shift=shift, seeds=seeds, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return list(pictures)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool = True,
        on_routing: OnRouting | None = None,
    ) -> Iterator[Image.Image]:
        """Yield one picture per prompt, in order, as batches finish.

        A picture depends on its own prompt, seed and settings; the rest of its batch changes rounding only.
        Equal prompts are encoded once, and their keys and values are kept while later pictures need them.

        Args:
            prompts: one per picture; "" is the empty prompt.
            negative_prompts: one for all or one per picture; None = the empty prompt. Not used without
                guidance.
            height, width: px, multiples of `size_unit_px`; None = the default, as for steps, guidance, shift.
            seeds: one per picture, any 64-bit number; None = 0, 1, 2, ...
            batch_size: pictures drawn at once.
            progress: show a bar of denoising steps.
            on_routing: called for each batch and step, as `sample_latents` does.

        Raises:
            ConfigError: a bad value, or a prompt that is too long (naming which).
        """
        config = self.settings(height=height, width=width, steps=steps, guidance=guidance, shift=shift)
        if batch_size < 1:
            raise ConfigError(f"--batch-size {batch_size}: must be at least 1")
        return self._stream(_jobs(prompts, negative_prompts, seeds), config, batch_size, progress, on_routing)

    def _stream(
        self,
        jobs: list[Job],
        config: SamplerConfig,
        batch_size: int,
        progress: bool,
        on_routing: OnRouting | None,
    ) -> Iterator[Image.Image]:
        window = max(1, WINDOW_IMAGES // batch_size) * batch_size
        batches = -(-len(jobs) // batch_size)
        grid = (config.height // self.size_unit_px, config.width // self.size_unit_px)
        project = functools.partial(self.project, grid=grid)

        def memory(start: int) -> TextMemory:
            part = jobs[start : start + window]
            return TextMemory(self.text_encoder, project, part, start, config.guidance > 1, batch_size)

        texts = memory(0)  # before the bar: a prompt that is too long is one line of error
        with tqdm(total=batches * config.steps, unit="step", desc="sample", disable=not progress) as bar:
            for at in range(0, len(jobs), batch_size):
                if at and at % window == 0:
                    texts = memory(at)
                part = jobs[at : at + batch_size]
                bar.set_postfix_str(f"images {at} to {at + len(part) - 1}")
                yield from self._draw(part, texts, at % window, config, bar, on_routing)

    @torch.no_grad()  # not inference_mode: cached rotation tables are shared with training
    def _draw(
        self,
        jobs: list[Job],
        texts: TextMemory,
        at: int,
        config: SamplerConfig,
        bar,
        on_routing: OnRouting | None,
    ) -> list[Image.Image]:
        noise_BSP, grid = self.noise([job.seed for job in jobs], config.height, config.width)
        positive, negative = texts.batch(at, len(jobs))
        latents_BSP = sample_latents(
            self.model, noise_BSP, positive, negative, grid, config.steps, config.guidance, config.shift,
            on_step=lambda i, x: bar.update(), on_routing=on_routing,
        )  # fmt: skip
        return self.decode(latents_BSP, grid)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> tuple[Tensor, tuple[int, int]]:
        """Packed starting noise [B, S, P] of each seed for a size in px, and its grid."""
        stride = self.codec.stride_px
        shape_CHW = (self.model.shape.latent_channels, height // stride, width // stride)
        noise_BCHW = torch.cat([rng.normal_batch(seed, [0], "sample-noise", shape_CHW) for seed in seeds])
        return pack(noise_BCHW.to(self._device()), self.model.shape.patch_size)

    @torch.no_grad()
    def decode(self, latents_BSP: Tensor, grid: tuple[int, int]) -> list[Image.Image]:
        """Packed clean latents -> RGB pictures."""
        latents_BCHW = unpack(latents_BSP, grid, self.model.shape.patch_size)
        pixels = latents_BCHW.shape[2] * latents_BCHW.shape[3] * self.codec.stride_px**2
        pictures = []
        for part_BCHW in latents_BCHW.split(max(1, DECODE_PIXELS // pixels)):
            pixels_BHWC = self.codec.decode(part_BCHW).permute(0, 2, 3, 1).cpu().numpy()
            pictures += [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
        return pictures

    @torch.no_grad()
    def project(self, features: TextFeatures, grid: tuple[int, int]) -> TextKV:
        """Text features -> keys and values on the model's device and in its dtype."""
        mask_BL = None if features.mask_BL is None else features.mask_BL.to(self._device())
        return self.model.project_text(features.features_BLU.to(self._device(), self._dtype()), mask_BL, grid)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def _jobs(
    prompts: Sequence[str], negatives: str | Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Job]:
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("prompts: expected a list with at least one prompt")
    n = len(prompts)
    if negatives is None or isinstance(negatives, str):
        negatives = [negatives or ""] * n
    seeds = range(n) if seeds is None else seeds
    for name, values in (("negative prompts", negatives), ("seeds", seeds)):
        if len(values) != n:
            raise ConfigError(f"{len(values)} {name} for {n} prompts; give one per prompt")
    for seed in seeds:
        if not -(1 << 63) <= seed < 1 << 63:
            raise ConfigError(f"--seed {seed}: must be a 64-bit number")
    return [Job(*job) for job in zip(prompts, negatives, seeds, strict=True)]


def check_size(name: str, value: int | None, unit: int) -> None:
    """Raise ConfigError unless ``value`` is a multiple of ``unit`` px; ``name`` is its flag."""
    if value is None:
        raise ConfigError(f"--{name}: no default size is known; give --height and --width in px")
    if value % unit:
        below, above = value // unit * unit, (value // unit + 1) * unit
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"--{name} {value}: must be a multiple of {unit} px (codec stride x patch); nearest: {near}"
        )


def load_pipeline(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    untrained: bool = False,
    expert_weights: str = "stored",
    text_encoder_device: str | None = None,
) -> Pipeline:
    """A pipeline from any checkpoint (run, step, merged, diffusers or pipeline folder).

    Args:
        device: ``auto`` (CUDA where it is there), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the model; None keeps what is stored. Encoders whose spec names no dtype take the model's.
        codec_path, text_encoder_path: folder or hub id of the Qwen-Image VAE and of Qwen3-VL; replace the
            checkpoint's own path, and are needed where it names no encoder.
        untrained: same architecture and encoders, weights freshly initialised with seed 0: a baseline.
        expert_weights: ``stored``, or ``fp8``: the routed experts rounded to 8 bits (`core/precision/expert_weights`).
            The model is then loaded in host memory and goes to the device layer by layer.
        text_encoder_device: where the text encoder runs; None = with the model. Each prompt passes it once.

    Raises:
        ConfigError: no checkpoint there, a device that is not there, encoders that are not known, or experts to round
            in a model that has none.
        DataError: a damaged checkpoint or encoder folder.
    """
    if expert_weights not in CHOICES:
        raise ConfigError(f"--expert-weights {expert_weights}: one of {', '.join(CHOICES)}")
    where = pick_device(device)
    text_where = where if text_encoder_device is None else pick_device(text_encoder_device)
    description = read_description(path)
    specs = [
        _encoder_spec(description.codec, "codec", "qwen_image_vae", codec_path, path),
        _encoder_spec(description.text_encoder, "text_encoder", "qwen3_vl", text_encoder_path, path),
    ]
    sampling = sampling_defaults(description)
    low, shape = expert_weights == "fp8", description.shape
    if low and not any(shape.is_moe(layer) for layer in range(shape.num_layers)):
        raise ConfigError(
            f"--expert-weights fp8: checkpoint {path} has no routed experts; leave the flag out"
        )
    first = torch.device("cpu") if low else where
    kernels = resolve_kernels(device_type=where.type, shape=shape, dtype=dtype)
    if untrained:
        model = NucleusTransformer(shape, kernels, seed=0).to(first, dtype).eval()
    else:
        model = load_model(path, device=first, dtype=dtype, kernels=kernels)
    if low:
        model = quantise_experts(model, where).to(where)
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    for spec in specs:
        if "path" in spec:
            spec.setdefault("dtype", name)
    return Pipeline(model, build_codec(specs[0], where), build_text_encoder(specs[1], text_where), sampling)


def sampling_defaults(description: CheckpointDescription) -> SamplerConfig:
    """Sampling settings stored in a checkpoint; what it leaves open is the released model's.

    Raises:
        DataError: a stored value that can draw nothing.
    """
    known = {f.name for f in dataclasses.fields(SamplerConfig)}
    stored = {k: v for k, v in description.sampling.items() if k in known and v is not None}
    try:
        config = dataclasses.replace(PUBLISHED, **stored)
        check_sampler(config)
    except (ConfigError, TypeError) as error:
        raise DataError(
            f"{description.path}: its sampling settings are damaged ({error}); correct them"
        ) from error
    return config


def _encoder_spec(
    stored: dict | None, kind: str, published: str, given: str | None, path: str | Path
) -> dict:
    """The spec to build; ``given`` is the path flag's value."""
    flag, noun = f"--{kind.replace('_', '-')}-path", kind.replace("_", " ")
    if stored is None:
        if given is None:
            raise ConfigError(
                f"checkpoint {path} does not name the {noun} it was trained with; give {flag}, the folder "
                f"or hub id of {published} (a diffusers pipeline folder holds it)"
            )
        return {"name": published, "path": given}
    if given is None:
        return dict(stored)
    if "path" not in stored:
        raise ConfigError(
            f"{flag} {given}: the checkpoint uses the built-in {noun} '{stored.get('name')}', which has no "
            "folder; leave the flag out"
        )
    return {**stored, "path": given}
