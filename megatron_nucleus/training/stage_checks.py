"""What the resolution, the model and the data of a stage must be to each other; checked before the first step."""

from __future__ import annotations

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data.batching import bucket_sizes
from megatron_nucleus.data.dataset import Corpus
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.utils.errors import ConfigError


def check_tokens(run: RunConfig, shape: ModelShape, corpus: Corpus, multiple_px: int) -> None:
    """Every image size of the run must give every expert tokens to choose from.

    Args:
        multiple_px: side of a token (codec stride x patch size).

    Raises:
        ConfigError: a resolution that tokens do not divide, or an image with fewer tokens than experts.
    """
    sides = dict.fromkeys((run.data.resolution_px, *run.validation.valid_resolutions_px))
    routes = any(shape.is_moe(layer) for layer in range(shape.num_layers))
    for px in sides:
        for bucket, size in bucket_sizes(corpus, px, multiple_px).items():
            if routes and size.tokens < shape.num_experts:
                raise ConfigError(
                    f"--num-experts {shape.num_experts}: bucket {bucket} at --resolution-px {px} has {size.tokens} "
                    f"image tokens, and each expert takes at least one of them; use at most {size.tokens} experts or "
                    "a higher resolution"
                )
