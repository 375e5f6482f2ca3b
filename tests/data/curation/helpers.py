"""Settings and inputs for tests that curate."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

from megatron_nucleus.data.curation.recipe import RecipeConfig, StageList
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.index import iter_rows

PLAIN = ("inspect", "exact_duplicates")
SCENES_CURATION = {
    "inspect": {"min_side_px": 32},
    "recipe": {"stages": list(PLAIN)},
}  # sections of a config file


def make_settings(stages=PLAIN, **knobs) -> Settings:
    """Settings with these stages and knobs of any section; in this process unless ``workers`` says otherwise."""
    knobs = {"workers": 1, "min_bucket_images": 1, "min_side_px": 64} | knobs
    sections = {"recipe": RecipeConfig(StageList.from_plain(list(stages), "stages"))}
    for field in dataclasses.fields(Settings):
        names = {
            f.name for f in dataclasses.fields(field.type if isinstance(field.type, type) else _type(field))
        }
        if mine := {name: knobs.pop(name) for name in names & knobs.keys()}:
            sections[field.name] = _type(field)(**mine)
    assert not knobs, knobs
    return Settings(**sections)


def _type(field: dataclasses.Field) -> type:
    return field.default_factory


def encode(image, format="PNG", **options) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_tar(path, members) -> None:
    """A plain tar of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def table(folder, schema) -> list[dict]:
    """Rows of all parts in a folder."""
    return [row for path in sorted(Path(folder).glob("*.parquet")) for row in iter_rows(path, schema)]


def files_of(folder) -> dict[str, bytes]:
    """Path -> content of all files."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def write_captioned(folder, pictures: dict[str, bytes], caption="a picture called {}") -> Path:
    """Files with a caption beside each."""
    folder.mkdir()
    for name, payload in pictures.items():
        (folder / name).write_bytes(payload)
        (folder / f"{Path(name).stem}.txt").write_text(caption.format(Path(name).stem))
    return folder
