"""What interrupts a run: signals, a time limit, gradients that are not finite."""

from __future__ import annotations

import logging
import signal
import time

from megatron_nucleus.utils.errors import StoppedError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) and a time limit into a flag the loop reads.

    A second SIGINT ends the program at once, as a person at a keyboard expects.
    """

    def __init__(self, limit_minutes: float | None = None):
        self.reason: str | None = None
        self._deadline = None if limit_minutes is None else time.monotonic() + 60.0 * limit_minutes
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.reason is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.reason = f"received {signal.Signals(number).name}"

    def due(self) -> str | None:
        """Why the run should save and stop now, or None."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "reached --exit-duration-in-mins"
        return self.reason


class SkipCounter:
    """Counts updates that were not applied because loss or gradient norm was not finite."""

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0

    def record(self, skipped: bool, step: int) -> None:
        """Raises StoppedError with advice after ``limit`` skipped steps in a row."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        log.warning(
            "step %d: loss or gradient is not finite; the update is skipped (%d in a row)",
            step,
            self.in_a_row,
        )
        if self.in_a_row >= self.limit:
            raise StoppedError(
                f"{self.in_a_row} steps in a row had no finite gradient (up to step {step}); nothing was saved since "
                "the last checkpoint. Resume with a lower --lr or a smaller --clip-grad, without --bf16 if it was on"
            )
