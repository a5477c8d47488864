"""The ways a run can end: one exception and one exit status each, told in one line."""

import sys
from contextlib import suppress
from typing import ClassVar


class RunError(Exception):
    """A run that cannot go on, said in one line: what, where, how to mend it."""

    status: ClassVar[int] = 1


class SettingsError(RunError):
    """A setting is unknown, ill-typed or does not fit the others (exit status 2)."""

    status = 2


class DataError(RunError):
    """The images are missing, empty or not what the settings say (exit status 3)."""

    status = 3


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or of another net (exit status 4)."""

    status = 4


class LaunchError(RunError):
    """The machine, its ports, its GPUs or the launcher do not fit (exit status 5)."""

    status = 5


class PeerLostError(RunError):
    """The other column, or another replica, is gone or does not answer (exit status 6)."""

    status = 6
    asked = False  # the launcher knows already: it has asked this process to end


class DivergedError(RunError):
    """The loss is no longer a finite number (exit status 7)."""

    status = 7


class StoppedError(RunError):
    """The run was asked to stop: it saved and goes on from there (exit status 75, EX_TEMPFAIL)."""

    status = 75


def error_from_text(text: str) -> RunError:
    """Return the error that another rank sent as ``STATUS LINE``."""
    status, _, line = text.partition(" ")
    kinds = {kind.status: kind for kind in RunError.__subclasses__()}
    return kinds.get(int(status), RunError)(line)


def one_line(error: BaseException) -> str:
    """Return the error's text folded into one line, without trailing white space."""
    return " ".join(str(error).split()) or type(error).__name__


def say(line: str) -> None:
    """Print one line to stderr; nothing where stderr is closed or cannot encode it."""
    with suppress(OSError):
        print(f"modelpar: {' '.join(line.split())}", file=sys.stderr, flush=True)  # noqa: T201
