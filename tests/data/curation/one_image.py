"""Help for tests of stages that look at one image: rows over files in a folder, and bytes in every format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_nucleus.data.curation.stage import PayloadSource, Row


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def row_of(
    folder: Path,
    payload: bytes,
    name: str = "picture.jpg",
    sidecars: dict[str, bytes] | None = None,
    *,
    max_file_bytes: int = 1 << 26,
    max_pixels: int = 1 << 26,
    **values: Any,
) -> Row:
    """A row as the reader hands it on; writes the files. values: other columns (``problem``, ``given``)."""
    (folder / name).write_bytes(payload)
    for sidecar, content in (sidecars or {}).items():
        (folder / sidecar).write_bytes(content)
    columns = {
        "item": name,
        "container": name.encode(),
        "offset": None,
        "length": None,
        "sidecars": [
            {"name": sidecar, "container": sidecar.encode(), "offset": None, "length": None}
            for sidecar in sidecars or {}
        ],
        "problem": None,
        "given": None,
        **values,
    }
    return Row(columns, PayloadSource(str(folder), max_file_bytes, max_pixels))
