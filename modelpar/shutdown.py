"""Signals that stop a run: a training finishes its step, saves, and exits with status 75.

SIGTERM (a scheduler, ``kill``), SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (a closed
terminal, unless ``nohup`` ignores it).
"""

import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modelpar.errors import PeerLostError

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A terminal, scancel and torchrun each send a signal to a whole group, so a process gets it twice.
DEBOUNCE_SECONDS: Final = 5.0  # in which further signals count as the same request


def kill_children(number: int) -> None:
    """Send SIGKILL to the process group of each child: a rank and what it has started."""
    del number
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has exited, or leads no group and is no rank
            _, parent, *_ = status.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                os.killpg(int(status.parent.name), signal.SIGKILL)


def exit_by_signal(number: int) -> None:
    """End this process by the signal, as if it had no handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@dataclass
class Request:
    """Whether this process has received a signal that stops the run, and which.

    ``first`` is called with the number of the first signal, ``again`` with that of each one that
    comes more than ``DEBOUNCE_SECONDS`` later.
    """

    first: Callable[[int], object] = lambda _: None
    again: Callable[[int], object] = exit_by_signal
    signal: int = 0  # number of the first signal; 0: none
    when: float = 0.0

    def handle(self, number: int, frame: Any) -> None:
        """Note a signal; a handler of Python's."""
        del frame
        if not self.signal:
            self.signal, self.when = number, time.monotonic()
            self.first(number)
        elif time.monotonic() - self.when > DEBOUNCE_SECONDS:
            self.again(number)


@contextmanager
def signals_noted(request: Request | None = None) -> Generator[Request]:
    """Note signals in a Request instead of ending, except those that the process ignores."""
    request = request or Request()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, request.handle)
    try:
        yield request
    except PeerLostError as error:
        error.stop_requested = bool(request.signal)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
