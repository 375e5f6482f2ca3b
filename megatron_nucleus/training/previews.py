"""Pictures while training: the same prompts and seeds each time, so that progress shows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from megatron_nucleus.evaluation.allocation import allocation_example, moe_layers
from megatron_nucleus.evaluation.report_figures import allocation_figure
from megatron_nucleus.inference.grid import contact_sheet
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.inference.text import encode_each


def check_previews(pipeline: Pipeline, prompts: tuple[str, ...]) -> None:
    """Encode the prompts once before the run starts, so that one that cannot be drawn is found then.

    Raises:
        ConfigError: a prompt is too long, naming it.
    """
    labels = {prompt: f"--sample-prompts: number {i} (counting from 0)" for i, prompt in enumerate(prompts)}
    if pipeline.sampling.guidance > 1:
        labels.setdefault("", "the empty negative prompt")
    encode_each(pipeline.text_encoder, labels, batch_size=16)


def draw_previews(
    pipeline: Pipeline, prompts: tuple[str, ...], folder: Path | None, step: int
) -> Image.Image:
    """Write ``step_00000100.png``, a contact sheet of one picture per prompt (seed i for prompt i).

    folder: None draws without writing.
    """
    with _evaluating(pipeline.model):
        images = pipeline.generate(list(prompts), seeds=list(range(len(prompts))), progress=False)
    sheet = contact_sheet(images, list(prompts))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step_{step:08d}.png")
    return sheet


def draw_routing_map(pipeline: Pipeline, prompt: str) -> Image.Image | None:
    """How many experts took each token of one picture, by layer and noise level; None without MoE layers."""
    if not moe_layers(pipeline.model.shape):
        return None
    with _evaluating(pipeline.model):
        figure = allocation_figure(*allocation_example(pipeline, prompt).figure())
    return Image.open(io.BytesIO(figure)).convert("RGB")


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
