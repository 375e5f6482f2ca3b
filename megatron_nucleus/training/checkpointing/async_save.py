"""A save beside the training: a copy of the state in host memory, and the thread that writes it."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, of the same names, shapes and placements; of sharded tensors this rank's part.

    Returns when the values are there: changing ``tensors`` afterwards changes nothing in the copies.
    """
    with torch.no_grad():
        return {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }


class Background:
    """Runs one action at a time in a thread of its own.

    What was started is finished before the interpreter exits, unless it was dropped by `wait` with a limit.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], object]) -> None:
        """Begin ``action``; the last one must have been waited for."""
        if self._thread is not None:
            raise ValueError("wait for the last action first")
        # A new thread begins on device 0: every rank of a node would open a context on the first GPU.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # Not kept alive by the interpreter: it may stand in a collective whose other side is gone.
        self._thread = threading.Thread(
            target=self._run, args=(action, device), name="checkpoint", daemon=True
        )
        atexit.register(self.wait)
        self._thread.start()

    def wait(self, limit_s: float | None = None) -> bool:
        """Until the action has ended, or is dropped after ``limit_s``; returns whether it has ended.

        Raises:
            the error of the action.
        """
        if self._thread is None:
            return True
        self._thread.join(limit_s)
        ended = not self._thread.is_alive()
        self._thread = None
        atexit.unregister(self.wait)
        error, self._error = self._error, None
        if ended and error is not None:
            raise error
        return ended

    def _run(self, action: Callable[[], object], device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            action()
        except BaseException as error:  # raised again by `wait`
            self._error = error
