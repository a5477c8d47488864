"""Errors and exit statuses: each way a run can end is one exception, one status and one line."""

import errno
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pickle import UnpicklingError
from typing import ClassVar, Final, NoReturn

from modelpar import limits

FULL: Final = {errno.ENOSPC, errno.EDQUOT}
DENIED: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
RENAMED: Final = {  # earlier values of settings
    "go_on": "continue",
    "apart": "no_crossing",
    "no_conv3": "drop_conv3",
    "no_conv4": "drop_conv4",
    "tiled": "non_overlapping",
    "first": "first_only",
    "within": "within_channel",
}


class RunError(Exception):
    """A run that cannot continue, in one line: what is wrong, where, and how to fix it."""

    status: ClassVar[int] = 1


class SettingsError(RunError):
    """A setting is unknown, of the wrong type, or does not fit the others."""

    status = 2


class DataError(RunError):
    """Images are missing, unreadable, or not those that the settings describe."""

    status = 3


class CheckpointError(RunError):
    """A checkpoint is missing, damaged or of another net, or it cannot be written."""

    status = 4


class LaunchError(RunError):
    """The machine, its ports, GPUs or memory, or the launcher do not fit the settings."""

    status = 5


class PeerLostError(RunError):
    """Another rank has exited or does not respond."""

    status = 6
    stop_requested = False  # of this rank, by a signal; then the error is reported without delay


class DivergedError(RunError):
    """The loss or a gradient is not finite, or the weights of replicas differ."""

    status = 7


class InUseError(CheckpointError):
    """Another run uses the run directory, so nothing is recorded there."""


class StoppedError(RunError):
    """A signal stopped the run, which saved a checkpoint and can be resumed (EX_TEMPFAIL)."""

    status = 75


def refuse_choice(key: str, value: object, choices: Iterable[object]) -> NoReturn:
    """Raise SettingsError that names the key, the value, the nearest choice and all of them."""
    names = [str(choice) for choice in choices]
    if (renamed := RENAMED.get(str(value))) in names:
        raise SettingsError(f"{key}={value}: this value is now called {renamed}")
    near = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SettingsError(f"{key}={value}: {hint}use one of {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """Return the error's text as one line, or its type's name where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def readable(what: str, advice: str, kind: type[RunError] = DataError) -> Generator[None]:
    """Turn whatever a library raises for damaged files into one error of this ``kind``."""
    try:
        yield
    except (RunError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        # torch's advice for a file that it does not trust would be to trust it.
        text = "not as expected" if isinstance(error, UnpicklingError) else one_line(error)[:200]
        raise kind(f"{what} ({text}); {advice}") from None


def describe(error: BaseException) -> tuple[int, str]:
    """Return the exit status of ``error`` and the line that is printed for it."""
    if isinstance(error, RunError):
        return error.status, one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"  # 128 + SIGINT, as shells count
    if line := limits.reached(error):
        return LaunchError.status, line
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        status = CheckpointError.status if error.errno in FULL else SettingsError.status
        fix = "; change its permissions, or use another path" if error.errno in DENIED else ""
        return status, f"{error.filename or sys.argv[0]}: {error.strerror}{fix}"
    return RunError.status, f"{type(error).__name__}: {one_line(error)}"


def say(line: str) -> None:
    """Print one line to stderr; nothing where stderr is closed or cannot encode it."""
    with suppress(OSError):
        print(f"modelpar: {' '.join(line.split())}", file=sys.stderr, flush=True)  # noqa: T201


def report(error: BaseException) -> int:
    """Print the line of ``error``, after a traceback if it is a bug; return its exit status."""
    status, line = describe(error)
    if status == RunError.status:
        traceback.print_exception(error)
    say(line)
    return status


def status_of(run: Callable[[], int | None]) -> int:
    """Return the exit status of ``run``, or report the error that it raises."""
    try:
        return run() or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each has its exit status
        return report(error)
