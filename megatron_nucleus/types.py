"""The nouns of the system, in the order in which an image meets them, and the shape legend.

Shape suffixes, used in every name (``x_BSD`` is [images, image tokens, width]):

    B images on this rank      S image tokens per image    L text tokens (padded)
    D model width              H query heads               G key/value heads     K head width
    U text-feature width       E experts                   e experts on this rank
    C rows per expert and image (the capacity)             N rows per expert on this rank = B*C
    F expert hidden width      P patch channels (latent channels x patch x patch)

A *grid* is ``(h, w)``: the image tokens' rows and columns, S = h*w, row-major.
Time is ``sigma`` in [0, 1]: 1 is noise, 0 is the clean latent (`core/flow.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # curation imports this module in many processes, and importing torch takes over a second
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Caption:
    """One caption of an image with its provenance (column ``captions`` of `data/index.py`)."""

    text: str
    length_class: str = "medium"  # short | medium | detailed
    source: str = "unknown"  # who wrote it: alt-text, a file beside the image, a generator's name
    model: str | None = None  # captioning model and revision, None for people and programs
    model_revision: str | None = None
    prompt_hash: str | None = None
    alignment: float | None = None  # image-text score in [0, 1]; None = never measured


@dataclasses.dataclass(frozen=True)
class Record:
    """One image before packing: original bytes and everything known about it."""

    source_id: str  # stable name inside the source, such as its relative path
    source: str
    payload: bytes  # the file as it was found
    captions: tuple[Caption, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    source_url: str | None = None
    licence: str = "unknown"  # SPDX identifier
    attribution: str | None = None


class TextFeatures(NamedTuple):
    """Output of the frozen text encoder, before anything learned.

    mask_BL: True where a token is real; None means that every token is. Padding stands at the end.
    """

    features_BLU: Tensor
    mask_BL: Tensor | None = None


class NormalisedText(NamedTuple):
    """Text features divided by their RMS, and the norm's weight, which the first projection takes over."""

    features_BLU: Tensor
    weight_U: Tensor


class TextKV(NamedTuple):
    """Keys and values of the text for every layer. They do not depend on time: keep them over denoising steps.

    k_BLGK / v_BLGK: one tensor per layer; keys are normalised and rotated for one image grid.
    """

    k_BLGK: tuple[Tensor, ...]
    v_BLGK: tuple[Tensor, ...]
    mask_BL: Tensor | None
    grid: tuple[int, int]


class Routing(NamedTuple):
    """Which tokens each expert takes, and how much each of its outputs counts.

    index_BEC: int64 token positions in [0, S), every expert takes exactly C tokens of each image.
    weight_BEC: route_scale times the score, renormalised over the experts that picked the token.
    logits_BSE: router logits in fp32, for the z-loss and for diagnostics.
    """

    index_BEC: Tensor
    weight_BEC: Tensor
    logits_BSE: Tensor


@dataclasses.dataclass(frozen=True)
class RawBatch:
    """What the loader yields: one aspect bucket, either pixels and captions or stored features.

    draws: position of each sample in the run's endless sample order; the key of its randomness.
    step_samples: images of the whole step over all ranks, of which this micro-batch holds some.
    pixels_BCHW: uint8 RGB [B, 3, height_px, width_px], or None when latents_BCHW holds stored codec output.
    texts: the chosen caption of each sample ("" where the caption was dropped).
    text: stored text features, or None when the text is still to be encoded.
    """

    bucket: str
    draws: tuple[int, ...]
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    step_samples: int
    pixels_BCHW: Tensor | None = None
    latents_BCHW: Tensor | None = None
    text: TextFeatures | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the model trains on.

    latents_BSP: clean packed latents, fp32, normalised per channel to about unit variance.
    """

    bucket: str
    draws: tuple[int, ...]
    latents_BSP: Tensor
    text: TextFeatures
    grid: tuple[int, int]


@dataclasses.dataclass
class TrainState:
    """Everything that changes while training. ``samples_seen`` is the one clock.

    step: optimizer steps taken, including skipped ones. samples_seen: images consumed so far.
    skipped: steps whose update was not applied because loss or gradient was not finite, or the loss a spike.
    loss_average: running mean of the loss over applied steps, what a spike is measured against; None before the first.
    """

    model: torch.nn.Module
    optimizer: Any
    step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    loss_average: float | None = None
