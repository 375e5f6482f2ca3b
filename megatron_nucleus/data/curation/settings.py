"""All settings of curation: the sections of a YAML file and the flags of ``tools/curate.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_nucleus.data import images
from megatron_nucleus.data.curation.engines import EngineConfig
from megatron_nucleus.data.curation.readers import ReadersConfig
from megatron_nucleus.data.curation.recipe import BUILT_IN, RecipeConfig
from megatron_nucleus.data.curation.stages.blank import BlankConfig
from megatron_nucleus.data.curation.stages.blur import BlurConfig
from megatron_nucleus.data.curation.stages.inspect import InspectConfig
from megatron_nucleus.data.curation.stages.near_duplicates import NearDuplicatesConfig
from megatron_nucleus.data.curation.stages.tiers import TiersConfig
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """What is read at all, and how the kept images are packed."""

    max_pixels: int = knob(images.MAX_PIXELS, "larger headers are refused before decoding", unit="pixels")
    max_file_bytes: int = knob(256 << 20, "larger files are not read", unit="bytes")
    min_bucket_images: int = knob(8, "smaller aspect buckets join the nearest one", unit="images")
    max_shard_bytes: int = knob(512 << 20, "size at which a new shard begins", unit="bytes")
    source: str = knob("user", "name of this collection, stored with every image")

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_shard_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: at least 1")
        if self.max_pixels > images.PILLOW_MAX_PIXELS:
            raise ConfigError(f"max_pixels {self.max_pixels}: at most {images.PILLOW_MAX_PIXELS}")
        if not self.source.strip():
            raise ConfigError("source is empty; name the collection")
        if self.min_bucket_images < 0:
            raise ConfigError(f"min_bucket_images {self.min_bucket_images}: 0 or more")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sections of a curation config file. A section named like a built-in stage holds that stage's settings."""

    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    readers: ReadersConfig = dataclasses.field(default_factory=ReadersConfig)
    inspect: InspectConfig = dataclasses.field(default_factory=InspectConfig)
    blank: BlankConfig = dataclasses.field(default_factory=BlankConfig)
    blur: BlurConfig = dataclasses.field(default_factory=BlurConfig)
    near_duplicates: NearDuplicatesConfig = dataclasses.field(default_factory=NearDuplicatesConfig)
    tiers: TiersConfig = dataclasses.field(default_factory=TiersConfig)
    curation: CurationConfig = dataclasses.field(default_factory=CurationConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def stage_sections(self) -> dict[str, Any]:
        """Settings of built-in stages, by the stage's name."""
        return {name: getattr(self, name) for name in BUILT_IN if hasattr(self, name)}
