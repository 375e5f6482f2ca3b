"""Real photographs: those that scikit-image and scikit-learn ship inside their packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def photo_files() -> dict[str, Path]:
    """File name -> path of photographs in both packages."""
    skimage, sklearn = package_folder("skimage") / "data", package_folder("sklearn") / "datasets" / "images"
    names = (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "retina.jpg",
        "color.png",
    )
    return {n: skimage / n for n in names} | {n: sklearn / n for n in ("china.jpg", "flower.jpg")}


@pytest.fixture(scope="session")
def photos(photo_files: dict[str, Path]) -> dict[str, Image.Image]:
    """The same, decoded."""
    out = {}
    for name, path in photo_files.items():
        with Image.open(path) as image:
            out[name] = image.copy()
    return out
