"""Pictures while training: the same prompts and seeds each time, so that progress shows."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

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


def draw_previews(pipeline: Pipeline, prompts: tuple[str, ...], folder: Path, step: int) -> Image.Image:
    """Write ``step_00000100.png``, a contact sheet of one picture per prompt (seed i for prompt i); returns it."""
    was_training = pipeline.model.training
    pipeline.model.eval()
    try:
        with torch.no_grad():
            images = pipeline.generate(list(prompts), seeds=list(range(len(prompts))), progress=False)
    finally:
        pipeline.model.train(was_training)
    sheet = contact_sheet(images, list(prompts))
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / f"step_{step:08d}.png")
    return sheet
