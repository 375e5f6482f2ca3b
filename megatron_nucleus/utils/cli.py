"""What every program in ``tools/`` shares: one-line errors, exit codes and the ``--json`` line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from megatron_nucleus.utils.errors import RankLostError, StoppedError, UserError


def add_json_flag(parser: Any) -> None:
    """Add ``--json``: print one machine-readable object as the last line of stdout."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout"
    )


def print_json(result: dict) -> None:
    """Print ``result`` as one line, floats with full precision."""
    sys.stdout.flush()
    print(json.dumps(result, allow_nan=False, default=str), flush=True)


@contextlib.contextmanager
def progress_bar(title: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """Yield a callable for (done, in all) that draws a bar on stderr; silent when that is no terminal.

    unit: bytes (scaled to MB and GB) by default.
    """
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=None, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


class Interrupted(KeyboardInterrupt):
    """A stop signal on its way up: no `Exception`, so that nothing takes it for a damaged file and goes on."""


@contextlib.contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Turn SIGINT (Ctrl-C) and SIGTERM inside the block into ``StoppedError("stopped by SIGTERM; <advice>")``.

    A block inside may take these signals for itself, as a training run does while it can save.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as stop:
        raise StoppedError(f"stopped by {str(stop) or 'SIGINT'}; {advice}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[], None], when_stopped: str = "the same command starts again") -> None:
    """Call ``main``; turn a UserError into one line on stderr and its exit code (`utils/errors.py`).

    Any other exception is a bug and keeps its traceback.

    Args:
        when_stopped: what to do after a stop signal, as the end of a message.
    """
    try:
        with stoppable(when_stopped):
            main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error, RankLostError):
            sys.stdout.flush()
            os._exit(error.exit_code)  # an orderly end would close connections to ranks that no longer answer
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
