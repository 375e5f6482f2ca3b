"""Errors a user can act on, each with the exit code that the programs promise (README, "Exit codes")."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of the errors that are the user's to mend: printed as one line, without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A bad argument or configuration value: names the option, the value and what is allowed."""

    exit_code = 2


class DataError(UserError):
    """Input data or a checkpoint is missing or damaged: names the file and what to do."""

    exit_code = 3


class StoppedError(UserError):
    """The run stopped on purpose (signal, time limit) after saving; the same command resumes it."""

    exit_code = 4


class RankLostError(UserError):
    """Another rank of the run died or is stuck; the same command resumes from the newest checkpoint."""

    exit_code = 5


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
