"""Pictures that a corpus stage looks at: decoded in workers, so that one that ends its process costs itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_nucleus.data.curation.engines import WorkerDied
from megatron_nucleus.data.curation.stage import PayloadSource
from megatron_nucleus.data.curation.store import Corpus

PICTURES_PER_TASK = 64  # own choice: some tenths of a second of decoding


class PictureTask(NamedTuple):
    """Pictures to look at. references: their `REFERENCE_COLUMNS`."""

    source: PayloadSource
    references: tuple[dict[str, Any], ...]


def map_pictures(
    corpus: Corpus, look: Callable[[PictureTask], list[Any]], references: Sequence[dict[str, Any]]
) -> list[Any]:
    """What ``look`` says of every picture, in order; a `WorkerDied` for one that ends the process.

    Of a task that ends its process every picture is tried as a task of its own.

    Args:
        look: module-level function with one result per picture of its task.

    Raises:
        DataError: more tasks or pictures end their process than `Corpus.map` allows.
    """

    def tasks(size: int, some: Sequence[dict[str, Any]]) -> list[PictureTask]:
        return [
            PictureTask(corpus.source, tuple(some[start : start + size]))
            for start in range(0, len(some), size)
        ]

    pieces = tasks(PICTURES_PER_TASK, references)
    found = list(corpus.map(look, pieces, lost_too=True))
    lost = [piece for piece, results in zip(pieces, found, strict=True) if isinstance(results, WorkerDied)]
    singles = tasks(1, [reference for piece in lost for reference in piece.references])
    again: Iterator[Any] = iter(list(corpus.map(look, singles, lost_too=True)) if singles else ())
    out: list[Any] = []
    for piece, results in zip(pieces, found, strict=True):
        if isinstance(results, WorkerDied):
            each = [next(again) for _ in piece.references]
            out += [one if isinstance(one, WorkerDied) else one[0] for one in each]
        else:
            out += results
    return out
