"""Learning rate as a function of samples seen: linear warm-up, then constant (Warmup-Stable-Merge).

There is no decay and no average of weights while training: averaging the last checkpoints afterwards takes
the place of both (arXiv 2507.17634; `export/merge.py`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then constant."""

    lr_warmup_steps: int = knob(
        1000, "linear warm-up (published), counted as steps x global batch size in samples", unit="steps"
    )

    def __post_init__(self) -> None:
        if self.lr_warmup_steps < 0:
            raise ConfigError(f"schedule.lr_warmup_steps: must be >= 0, got {self.lr_warmup_steps}")


class Schedule(NamedTuple):
    """Learning rate of a step by the samples that were seen before it.

    lr: rate after warm-up. warmup_samples: length of the ramp. global_batch_size: samples of one step.
    """

    lr: float
    warmup_samples: int
    global_batch_size: int

    def __call__(self, samples_seen: int) -> float:
        """Rate of the step that starts after ``samples_seen`` samples.

        The step's own samples count, so the first step has lr/lr_warmup_steps and not zero, and step number
        lr_warmup_steps is the first with the full rate.
        """
        if self.warmup_samples == 0:
            return self.lr
        return self.lr * min(1.0, (samples_seen + self.global_batch_size) / self.warmup_samples)


def build_schedule(config: ScheduleConfig, lr: float, global_batch_size: int) -> Schedule:
    """Turn the warm-up's steps into samples with this run's batch size.

    The clock of a run is samples seen. A run that resumes with another global batch size therefore re-reads
    ``lr_warmup_steps`` in steps of the new size.
    """
    return Schedule(lr, config.lr_warmup_steps * global_batch_size, global_batch_size)
