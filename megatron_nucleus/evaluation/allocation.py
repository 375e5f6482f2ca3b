"""Which tokens of a picture the experts choose: at several noise levels, or step by step while it is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.agreement import choice_agreement
from megatron_nucleus.core.moe.stats import RoutingMeter, RoutingReport, taken_mask
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.inference.sampler import OnRouting, SamplerConfig, sample_latents, stack_text
from megatron_nucleus.types import Routing, TextKV
from megatron_nucleus.utils.errors import ConfigError

SIGMAS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
ESTIMATE_PX = 256  # side of the pictures kept of each step (own choice): 50 of them fit into a page


class Allocation(NamedTuple):
    """Choices of the experts of every MoE layer.

    layers: numbers of the MoE blocks. sigmas: noise levels. taken: bool [layers, sigmas, E, h, w], True where the
    expert took the token.
    """

    layers: tuple[int, ...]
    sigmas: tuple[float, ...]
    taken: Tensor

    def counts(self) -> Tensor:
        """How many experts took each token: int64 [layers, sigmas, h, w]."""
        return self.taken.sum(2)


class Example(NamedTuple):
    """A generated picture, the noisy pictures the model was shown, one per noise level, and its allocation."""

    prompt: str
    picture: Image.Image
    noisy: list[Image.Image]
    allocation: Allocation

    def figure(self) -> tuple[Allocation, Image.Image, list[Image.Image], list[str]]:
        """Arguments of `report_figures.allocation_figure`: every noise level under what the model was shown."""
        titles = [f"noise level {sigma:g}" for sigma in self.allocation.sigmas]
        return self.allocation, self.picture, self.noisy, titles


@torch.no_grad()
def expert_allocation(
    model: NucleusTransformer,
    clean_BSP: Tensor,
    noise_BSP: Tensor,
    text: TextKV,
    grid: tuple[int, int],
    sigmas: Sequence[float] = SIGMAS,
) -> Allocation:
    """Route one picture at several noise levels.

    Args:
        clean_BSP: packed latents of the picture, B = 1. noise_BSP: noise to mix in, as much as sigma says.
        text: keys and values of its prompt.

    Raises:
        ValueError: more than one picture.
    """
    if len(clean_BSP) != 1:
        raise ValueError(f"expert_allocation looks at one picture, got {len(clean_BSP)}")
    noisy_BSP, sigma_B = _noisy(clean_BSP, noise_BSP, sigmas)
    dtype = next(model.parameters()).dtype
    texts = stack_text([text] * len(sigmas))
    _, routings = model(noisy_BSP.to(dtype), sigma_B, texts, grid, return_routing=True)
    taken = torch.stack([taken_mask(r.index_BEC, grid[0] * grid[1]).unflatten(2, grid) for r in routings])
    return Allocation(moe_layers(model.shape), tuple(sigmas), taken.cpu())


def moe_layers(shape: ModelShape) -> tuple[int, ...]:
    """Numbers of the blocks that route, in order."""
    return tuple(i for i in range(shape.num_layers) if shape.is_moe(i))


def allocation_example(
    pipeline: Pipeline, prompt: str, seed: int = 0, sigmas: Sequence[float] = SIGMAS
) -> Example:
    """Draw a picture with the pipeline's defaults, then mix its own starting noise back in and route it."""
    start = _start(pipeline, prompt, "", seed, pipeline.settings())
    clean_BSP = _sample(pipeline, start)
    allocation = expert_allocation(
        pipeline.model, clean_BSP, start.noise_BSP, start.positive, start.grid, sigmas
    )
    noisy = pipeline.decode(_noisy(clean_BSP, start.noise_BSP, sigmas)[0], start.grid)
    return Example(prompt, pipeline.decode(clean_BSP, start.grid)[0], noisy, allocation)


class Drawing(NamedTuple):
    """How one picture came about, step by step.

    config: the settings it was drawn with. picture: the result.
    estimates: the clean picture as the model foresees it in each step (guidance included), at most about
        `ESTIMATE_PX` high and wide.
    allocation: choices for the prompt; its sigmas are the noise levels of the steps.
    kept: fp64 [layers, steps - 1], `choice_agreement` of each step with the next. chance: the same for choices at
        random, one per layer.
    routing: figures of every step.
    """

    prompt: str
    seed: int
    config: SamplerConfig
    picture: Image.Image
    estimates: list[Image.Image]
    allocation: Allocation
    kept: Tensor
    chance: tuple[float, ...]
    routing: StepMeter


class StepMeter:
    """Figures of every denoising step, over all pictures drawn; give it to a sampler as ``on_routing``.

    Adding waits for nothing on the host.

    Args:
        grid: of the pictures. device: of the model.
    """

    def __init__(self, shape: ModelShape, grid: tuple[int, int], device: torch.device | str = "cpu"):
        self.meter, self.grid = RoutingMeter(moe_layers(shape), shape.num_experts, device), grid
        self.sigmas: list[float] = []
        self.sums: list[Tensor] = []

    def __call__(self, step: int, sigma: float, routings: list[Routing]) -> None:
        """Add one batch of pictures in one step."""
        logits_BSE = routings[0].logits_BSE
        sigma_B = torch.full((len(logits_BSE),), sigma, device=logits_BSE.device)
        self.meter.reset()
        self.meter.add(routings, sigma_B, self.grid)
        if step == len(self.sums):
            self.sigmas.append(sigma)
            self.sums.append(self.meter.sums())
        else:
            self.sums[step] += self.meter.sums()

    def reports(self) -> tuple[list[RoutingReport], RoutingReport]:
        """One report per step, and one of all steps together, whose images are pictures times steps."""
        return [self.meter.report(sums) for sums in self.sums], self.meter.report(
            torch.stack(self.sums).sum(0)
        )

    def document(self) -> dict[str, Any]:
        """Both as JSON: {"all_steps": {...}, "steps": [{"step" from 1, "sigma", ...}, ...]}."""
        steps, whole = self.reports()
        rows = enumerate(zip(self.sigmas, steps, strict=True), 1)
        return {
            "all_steps": dataclasses.asdict(whole),
            "steps": [{"step": i, "sigma": sigma, **dataclasses.asdict(row)} for i, (sigma, row) in rows],
        }


@torch.no_grad()
def draw_with_routing(
    pipeline: Pipeline,
    prompt: str,
    config: SamplerConfig,
    *,
    seed: int = 0,
    negative_prompt: str = "",
    progress: bool = False,
) -> Drawing:
    """Draw one picture, the same as `Pipeline.generate` draws, and keep what the experts chose in every step.

    Memory beside the model: layers * steps * E * S bytes for the choices; 380 MB for 29 layers, 50 steps, 64 experts
    and 4,096 tokens.

    Args:
        config: settings as `Pipeline.settings` returns them.
        progress: show a bar of denoising steps.

    Raises:
        ConfigError: a prompt that is too long, or a model without MoE layers.
    """
    layers = moe_layers(pipeline.model.shape)
    if not layers:
        raise ConfigError(
            "the model has no MoE layers, so nothing is routed; name a checkpoint of a model with experts"
        )
    start = _start(pipeline, prompt, negative_prompt, seed, config)
    with tqdm(total=config.steps, unit="step", desc="draw", disable=not progress) as bar:
        recorder = _Recorder(pipeline, layers, start, bar)
        clean_BSP = _sample(pipeline, start, recorder.on_step, recorder.on_routing)
    return Drawing(
        prompt,
        seed,
        config,
        pipeline.decode(clean_BSP, start.grid)[0],
        recorder.estimates,
        Allocation(layers, tuple(recorder.routing.sigmas), recorder.taken),
        torch.stack(recorder.kept, 1).cpu() if recorder.kept else torch.zeros(len(layers), 0),
        tuple(index_BEC.shape[2] / recorder.tokens for index_BEC in recorder.before),
        recorder.routing,
    )


class _Recorder:
    """Collects what `Drawing` holds while the sampler runs; one picture."""

    def __init__(self, pipeline: Pipeline, layers: tuple[int, ...], start: _Start, bar: tqdm):
        shape, self.grid = pipeline.model.shape, start.grid
        self.pipeline, self.bar, self.tokens = pipeline, bar, self.grid[0] * self.grid[1]
        self.routing = StepMeter(shape, self.grid, start.noise_BSP.device)
        self.taken = torch.zeros(
            len(layers), start.config.steps, shape.num_experts, *self.grid, dtype=torch.bool
        )
        self.latents_BSP = start.noise_BSP.float()
        self.next_sigmas = flow.sampling_sigmas(start.config.steps, start.config.shift).tolist()[1:]
        self.estimates: list[Image.Image] = []
        self.kept: list[Tensor] = []
        self.before: list[Tensor] = []

    def on_routing(self, step: int, sigma: float, routings: list[Routing]) -> None:
        self.routing(step, sigma, routings)
        for layer, routing in enumerate(routings):
            taken_ES = taken_mask(routing.index_BEC, self.tokens)[0]
            self.taken[layer, step] = taken_ES.view(-1, *self.grid).cpu()
        now = [routing.index_BEC for routing in routings]
        if self.before:
            pairs = zip(self.before, now, strict=True)
            self.kept.append(torch.stack([choice_agreement(a, b, self.tokens).share for a, b in pairs]))
        self.before = now

    def on_step(self, step: int, latents_BSP: Tensor) -> None:
        sigma, following = self.routing.sigmas[step], self.next_sigmas[step]
        velocity_BSP = (latents_BSP - self.latents_BSP) / (sigma - following)  # undoes the Euler step
        sigma_B = torch.full((1,), sigma, device=latents_BSP.device)
        estimate_BSP = flow.clean_estimate(self.latents_BSP, velocity_BSP, sigma_B)
        self.estimates.append(_small(self.pipeline.decode(estimate_BSP, self.grid)[0], self.grid))
        self.latents_BSP = latents_BSP
        self.bar.update()


class _Start(NamedTuple):
    """What a picture is drawn from."""

    noise_BSP: Tensor
    positive: TextKV
    negative: TextKV | None
    grid: tuple[int, int]
    config: SamplerConfig


def _start(pipeline: Pipeline, prompt: str, negative: str, seed: int, config: SamplerConfig) -> _Start:
    noise_BSP, grid = pipeline.noise([seed], config.height, config.width)
    positive = pipeline.project(pipeline.text_encoder.encode([prompt]), grid)
    guided = config.guidance > 1
    against = pipeline.project(pipeline.text_encoder.encode([negative]), grid) if guided else None
    return _Start(noise_BSP, positive, against, grid, config)


def _sample(
    pipeline: Pipeline,
    start: _Start,
    on_step: Callable[[int, Tensor], None] | None = None,
    on_routing: OnRouting | None = None,
) -> Tensor:
    config = start.config
    return sample_latents(
        pipeline.model, start.noise_BSP, start.positive, start.negative, start.grid, config.steps, config.guidance,
        config.shift, on_step, on_routing,
    )  # fmt: skip


def _noisy(clean_BSP: Tensor, noise_BSP: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    sigma_B = torch.tensor(list(sigmas), dtype=torch.float32, device=clean_BSP.device)
    n = len(sigma_B)
    return flow.add_noise(clean_BSP.expand(n, -1, -1), noise_BSP.expand(n, -1, -1), sigma_B), sigma_B


def _small(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The picture, shrunk to a whole number of pixels per token where it is larger than `ESTIMATE_PX`."""
    per_token = max(1, ESTIMATE_PX // max(grid))
    size = (grid[1] * per_token, grid[0] * per_token)
    return picture if picture.width <= size[0] else picture.resize(size, Image.Resampling.LANCZOS)
