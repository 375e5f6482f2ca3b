"""Train a head for curation's scorers from ratings of pictures, and say what it is worth on pictures left out.

--ratings is a CSV file with the columns file (relative to --images) and rating (a number, any scale); others are
ignored. The head is used by a recipe as {score: {kind: aesthetic, model: MODEL, head: OUTPUT}}, or kind: rating.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_nucleus.data import images
from megatron_nucleus.data.curation.scorers import FeatureModel, open_features
from megatron_nucleus.data.curation.scorers.embedding import DEVICES, DTYPES
from megatron_nucleus.data.curation.scorers.head import (
    Head,
    HeadInfo,
    Quality,
    cross_validate,
    fit_ridge,
    fold_of,
    save_head,
)
from megatron_nucleus.data.curation.scorers.protocol import reduced
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.utils import cli
from megatron_nucleus.utils.config import Parser
from megatron_nucleus.utils.errors import ConfigError, DataError

MIN_RATINGS = 30  # own choice: with fewer a rank correlation is uncertain by 0.2 and more
BATCH_PICTURES = 32  # as many as the stage gives a scorer at once
MAX_FILE_BYTES = 256 << 20  # as curation's default


class Rated(NamedTuple):
    """One line of the ratings. line: in the file, for messages."""

    file: str
    rating: float
    line: int


def main(argv: Sequence[str] | None = None) -> None:
    """Read, embed, cross-validate, fit on everything, write."""
    args = _parse(argv)
    root, output = Path(args.images), Path(args.output)
    if not root.is_dir():
        raise ConfigError(f"--images {root}: no such folder")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is no folder")
    if output.exists():
        raise ConfigError(f"--output {output}: exists already; give another name, or remove it")
    rows = read_ratings(Path(args.ratings), root)
    if not 2 <= args.folds <= len(rows):
        raise ConfigError(f"--folds {args.folds}: from 2 to the number of ratings, {len(rows)}")
    features = open_features(args.model, args.model_revision, args.device, args.dtype)
    vectors, contents = embed(features, root, rows, Path(args.ratings))
    ratings = np.array([row.rating for row in rows])
    quality = cross_validate(vectors, ratings, fold_of(contents, args.folds))
    head = train(features, vectors, ratings, quality, args.folds)
    save_head(output, head)
    better = quality.rmse < quality.baseline_rmse
    print(
        f"{output}: {len(rows)} ratings, {features.dim} features of {features.name}\n"
        f"on pictures left out ({args.folds} folds): RMSE {quality.rmse:.4g} (always the mean: "
        f"{quality.baseline_rmse:.4g}), rank correlation {quality.spearman:.3f}"
    )
    if not better:
        print(
            "this head is no better than always saying the mean: do not use it; more ratings, or another model"
        )
    if args.json:
        result = {"output": str(output), "better_than_mean": better, **dataclasses.asdict(head.info)}
        cli.print_json(result)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tools/train_scorer.py", description=__doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--ratings", required=True, metavar="FILE", help="CSV with columns file and rating")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="folder or hub id of a SigLIP or CLIP model; or image_statistics",
    )
    parser.add_argument(
        "--model-revision", default="", metavar="COMMIT", help="of a hub model, 40 hex digits"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="new file, such as head.safetensors")
    parser.add_argument(
        "--folds", type=int, default=5, metavar="N", help="of the cross-validation [default 5]"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="[default auto]")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model [default auto]")
    cli.add_json_flag(parser)
    return parser.parse_args(argv)


def read_ratings(path: Path, root: Path) -> list[Rated]:
    """The lines of a CSV file, checked: every file exists once inside ``root``, every rating is a finite number.

    Raises:
        ConfigError: no such file, a missing column, or fewer than `MIN_RATINGS` lines.
        DataError: a bad line, naming it; or ratings that are all equal.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for column in ("file", "rating"):
                if column not in (reader.fieldnames or ()):
                    raise ConfigError(
                        f"--ratings {path}: no column {column}; found {', '.join(reader.fieldnames or ()) or 'none'}"
                    )
            width = len(reader.fieldnames or ())
            rows = [_rated(path, reader.line_num, line, root, width) for line in reader]
    except OSError as error:
        raise ConfigError(f"--ratings {path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--ratings {path}: no CSV in UTF-8 ({error})") from error
    first: dict[str, Rated] = {}
    for row in rows:
        if row.file in first:
            raise DataError(
                f"{path}, line {row.line}: {row.file} was rated in line {first[row.file].line} already"
            )
        first[row.file] = row
    if len(rows) < MIN_RATINGS:
        raise ConfigError(f"--ratings {path}: {len(rows)} ratings; at least {MIN_RATINGS} are needed")
    if len({row.rating for row in rows}) == 1:
        raise DataError(
            f"--ratings {path}: all ratings are {rows[0].rating:g}: there is nothing to learn from"
        )
    return rows


def _rated(path: Path, number: int, line: dict, root: Path, width: int) -> Rated:
    """width: fields of the header; those beyond it are under the key None of `csv.DictReader`."""
    where = f"{path}, line {number}"
    if None in line:
        raise DataError(
            f"{where}: {width + len(line[None])} fields, the header has {width}; write decimals with a point, "
            "and a field with a comma in quotes"
        )
    name, text = line["file"], line["rating"]
    if not name or text is None:
        raise DataError(f"{where}: file or rating is empty")
    try:
        rating = float(text)
    except ValueError:
        raise DataError(f"{where}: rating {text!r} of {name} is no number") from None
    if not math.isfinite(rating):
        raise DataError(f"{where}: rating {text} of {name} is not finite")
    name = os.path.normpath(name)
    if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        raise DataError(f"{where}: {name} lies outside the folder of the pictures; give names relative to it")
    if not (root / name).is_file():
        raise DataError(f"{where}: {root / name}: no such file")
    return Rated(name, rating, number)


def embed(
    features: FeatureModel, root: Path, rows: Sequence[Rated], ratings: Path
) -> tuple[np.ndarray, list[str]]:
    """Vectors float32 [rows, dim], and the sha256 of each file; pictures are decoded as curation's stage does.

    Raises:
        DataError: a picture that cannot be decoded, or the same content under two names.
    """
    source = PayloadSource(str(root), MAX_FILE_BYTES, images.MAX_PIXELS)
    vectors, seen = [], {}
    with cli.progress_bar("embed", unit="pictures") as show:
        for start in range(0, len(rows), BATCH_PICTURES):
            pictures = []
            for row in rows[start : start + BATCH_PICTURES]:
                payload = (root / row.file).read_bytes()
                digest = hashlib.sha256(payload).hexdigest()
                if digest in seen:  # it could be in a fold's training part and in what is left out
                    raise DataError(
                        f"{ratings}, line {row.line}: {row.file} has the same bytes as {seen[digest]}; rate it once"
                    )
                seen[digest] = row.file
                try:
                    with images.quiet_decoding():
                        picture = source.decode(payload, features.side_px)
                    pictures.append(reduced(picture, features.side_px))
                except images.UnusableImage as problem:
                    raise DataError(f"{ratings}, line {row.line}: {row.file}: {problem}") from problem
            vectors.append(features.embed(pictures))
            show(start + len(pictures), len(rows))
    return np.concatenate(vectors), list(seen)


def train(
    features: FeatureModel, vectors: np.ndarray, ratings: np.ndarray, quality: Quality, folds: int
) -> Head:
    """The head of all ratings; ``quality`` is what cross-validation said of heads like it."""
    weights, intercept, penalty = fit_ridge(vectors, ratings)
    info = HeadInfo(
        model=features.name,
        model_revision=features.revision,
        checksum=features.checksum,
        dim=features.dim,
        rows=len(ratings),
        penalty=penalty,
        folds=folds,
        rmse=quality.rmse,
        spearman=quality.spearman,
        baseline_rmse=quality.baseline_rmse,
        rating_min=float(ratings.min()),
        rating_max=float(ratings.max()),
    )
    return Head(weights, intercept, info)


if __name__ == "__main__":
    cli.run(main)
