"""What interrupts a run: signals, a time limit, losses and gradients that cannot be used."""

from __future__ import annotations

import logging
import math
import signal
import time

from megatron_nucleus.training.step_report import StepReport
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import StoppedError

log = logging.getLogger(__name__)

SPIKE_AFTER = 50  # updates before a loss can be a spike: the running mean must mean something first
_MEAN_DECAY = 0.98
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


class SkipRule:
    """Decides whether a step's update is applied, the same on every rank, and counts those that are not.

    Args:
        limit: skipped steps in a row that end the run.
        spike_factor: a rank's loss above this multiple of the running mean is a spike; None = never. It counts
            from `SPIKE_AFTER` updates on.
    """

    def __init__(self, limit: int, spike_factor: float | None):
        self.limit, self.spike_factor, self.in_a_row = limit, spike_factor, 0

    def applies(self, report: StepReport, state: TrainState) -> bool:
        """Whether to apply the update; takes the loss into the running mean if so.

        Raises:
            StoppedError: with advice, after ``limit`` skipped steps in a row.
        """
        reason = self._why_not(report, state)
        if reason is None:
            mean = report.loss if state.loss_average is None else state.loss_average
            state.loss_average = mean + (report.loss - mean) * (1.0 - _MEAN_DECAY)
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        step = state.step + 1
        log.warning("step %d: %s; the update is skipped (%d in a row)", step, reason, self.in_a_row)
        if self.in_a_row >= self.limit:
            raise StoppedError(
                f"{self.in_a_row} steps in a row were skipped (up to step {step}: {reason}); nothing was saved since "
                "the last checkpoint. Resume with a lower --lr or a smaller --clip-grad, without --bf16 if it was on, "
                "or with a higher --loss-spike-factor if the data is that uneven"
            )
        return False

    def _why_not(self, report: StepReport, state: TrainState) -> str | None:
        for what, values in (("loss", report.losses), ("gradient", report.square_sums)):
            ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
            if ranks:
                return f"{what} of {_name_ranks(ranks)} is not finite"
        seasoned = state.loss_average is not None and state.step - state.skipped >= SPIKE_AFTER
        if self.spike_factor is None or not seasoned:
            return None
        bound = self.spike_factor * state.loss_average
        ranks = [rank for rank, loss in enumerate(report.losses) if loss > bound]
        if not ranks:
            return None
        return (
            f"loss {max(report.losses):.4g} of {_name_ranks(ranks)} is above {self.spike_factor:g} times the "
            f"running mean {state.loss_average:.4g} (--loss-spike-factor)"
        )


def _name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
