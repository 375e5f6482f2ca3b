"""Who of the ranks is missing, and how to say it: signs of life in, sentences out. No clocks, no processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

RUNNING, DONE, ENDED = "running", "done", "ended"
_NAMED_GROUPS = 4  # a message stays one line; further groups of ranks are counted


class Beat(NamedTuple):
    """A sign of life: what one rank publishes about itself.

    count: grows by one with every beat. step: of training, -1 before the first. index: phases begun in this step.
    phase: such as ``backward``. seconds: spent in the phase. allowed_s: what the phase may take.
    place: see `whereabouts.Place`; empty while the phase is young. waits: whether ``place`` is a collective.
    state: RUNNING, DONE (an orderly end) or ENDED (by an error).
    """

    count: int
    step: int
    index: int
    phase: str
    seconds: float
    allowed_s: float
    place: str
    waits: bool
    state: str

    def to_text(self) -> str:
        """For the store; `from_text` reads it."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: bytes | str) -> Beat:
        return cls(*json.loads(text))

    @property
    def order(self) -> tuple[int, int]:
        """Later positions of a run compare greater."""
        return (self.step, self.index)

    @property
    def has_left(self) -> bool:
        """Whether no further beats are to be expected."""
        return self.state != RUNNING

    def where(self) -> str:
        """``in step 12, backward, in all_reduce (core/collectives.py:88)``."""
        step = f"step {self.step}, " if self.step >= 0 else ""
        return f"in {step}{self.phase}" + (f", {self.place}" if self.place else "")


class Sighting(NamedTuple):
    """A rank's last beat and for how long it has been the last."""

    beat: Beat
    silent_s: float


class Finding(NamedTuple):
    """Why the run cannot go on: the ranks at fault (none if it is nobody's), and a sentence."""

    ranks: tuple[int, ...]
    text: str

    def to_text(self) -> str:
        """For the store; `from_text` reads it."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: bytes | str) -> Finding:
        ranks, sentence = json.loads(text)
        return cls(tuple(ranks), sentence)


def find_silent(seen: Mapping[int, Sighting], dead_after_s: float, margin_s: float) -> Finding | None:
    """Ranks that ended without a word or do not run any more, once one has been silent for ``dead_after_s``.

    margin_s: ranks that fell silent so much later are named with it: they went down together.
    """
    silence = {rank: s.silent_s for rank, s in seen.items() if not s.beat.has_left}
    if not any(seconds > dead_after_s for seconds in silence.values()):
        return None
    lost = {rank: seen[rank] for rank, seconds in silence.items() if seconds > dead_after_s - margin_s}
    return Finding(tuple(sorted(lost)), _sentence(lost, _say_silent))


def find_missing(world: int, seen: Mapping[int, Sighting], silent_after_s: float) -> Finding:
    """Whom the others wait for, when a rank has waited for longer than it may.

    Ranks without a (recent) sign of life or that are no longer part of the run; else ranks that are behind the
    others; else, in one phase, those outside of a collective that others wait in. If there are none, the finding
    blames nobody.
    """
    absent = [rank for rank in range(world) if rank not in seen]
    gone = {rank: s for rank, s in seen.items() if s.beat.has_left or s.silent_s > silent_after_s}
    if absent or gone:
        text = f"{rank_list(absent)} never gave a sign of life" if absent else ""
        text = "; ".join(x for x in (text, _sentence(gone, _say_gone)) if x)
        return Finding(tuple(sorted([*absent, *gone])), text)
    latest = max(s.beat.order for s in seen.values())
    behind = {rank: s for rank, s in seen.items() if s.beat.order < latest}
    if not behind and any(s.beat.waits for s in seen.values()):
        behind = {rank: s for rank, s in seen.items() if not s.beat.waits}
    if behind:
        waiting = {rank: s for rank, s in seen.items() if rank not in behind}
        text = f"{_sentence(behind, _say_behind)}; {_sentence(waiting, _say_waiting)}"
        return Finding(tuple(sorted(behind)), text)
    text = f"all {world} ranks are alive and in the same phase: a deadlock, or slow work or links"
    return Finding((), f"{text}; {_sentence(seen, _say_waiting)}")


def rank_list(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2,7``: neighbours are joined."""
    runs: list[list[int]] = []
    numbers = sorted(ranks)
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' * (len(numbers) > 1)} {text}"


def _say_silent(ranks: list[int], sighting: Sighting) -> str:
    verb = "is" if len(ranks) == 1 else "are"
    return (
        f"{rank_list(ranks)} {verb} dead or frozen: last sign of life {sighting.silent_s:.0f} s ago, "
        f"{sighting.beat.where()}"
    )


def _say_gone(ranks: list[int], sighting: Sighting) -> str:
    if not sighting.beat.has_left:
        seconds = f"{sighting.silent_s:.0f} s"
        return f"{rank_list(ranks)} gave no sign of life for {seconds}, the last {sighting.beat.where()}"
    ended = "finished the run" if sighting.beat.state == DONE else "ended with an error"
    return f"{rank_list(ranks)} {ended} {sighting.beat.where()}"


def _say_behind(ranks: list[int], sighting: Sighting) -> str:
    verb = "has" if len(ranks) == 1 else "have"
    beat = sighting.beat
    return f"{rank_list(ranks)} {verb} not arrived: alive, for {beat.seconds:.0f} s {beat.where()}"


def _say_waiting(ranks: list[int], sighting: Sighting) -> str:
    verb = "waits" if len(ranks) == 1 else "wait"
    return f"{rank_list(ranks)} {verb} {sighting.beat.where()}"


def _sentence(seen: Mapping[int, Sighting], say: Callable[[list[int], Sighting], str]) -> str:
    """One clause for each group of ranks that are at the same place, the largest groups first."""
    groups: dict[tuple, list[int]] = {}
    for rank, sighting in sorted(seen.items()):
        beat = sighting.beat
        groups.setdefault((beat.state, beat.order, beat.phase, beat.place), []).append(rank)
    largest = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))
    clauses = [say(ranks, max((seen[r] for r in ranks), key=lambda s: s.silent_s)) for ranks in largest]
    rest = sum(len(ranks) for ranks in largest[_NAMED_GROUPS:])
    more = [f"{rest} more ranks elsewhere"] if rest else []
    return "; ".join(clauses[:_NAMED_GROUPS] + more)
