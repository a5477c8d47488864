"""Signals that stop a run: a training finishes its step, saves, and exits with status 75.

SIGTERM (a scheduler, ``kill``), SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (a closed
terminal, unless ``nohup`` ignores it).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from modelpar.errors import PeerLostError

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A terminal, scancel and torchrun each send a signal to a whole group, so a process gets it twice.
DEBOUNCE_SECONDS: Final = 5.0  # in which further signals count as the same request


def ignore_signals(worker: int) -> None:
    """Make a loader's ``worker`` ignore signals sent to its process group.

    Its rank terminates it when the rank itself is done.
    """
    del worker
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    # A signal handler does not learn who sent the signal, but sigwaitinfo does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_rank, daemon=True).start()


def _exit_with_rank() -> None:
    """Exit at a SIGTERM from the rank that started this worker."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def kill_children(number: int) -> None:
    """Send SIGKILL to the process group of each child: a rank with its loader workers."""
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


class Request:
    """Whether this process has received a signal that stops the run, and which."""

    def __init__(
        self,
        first: Callable[[int], object] = lambda _: None,
        again: Callable[[int], object] = exit_by_signal,
    ) -> None:
        self.signal = 0  # number of the first signal; 0: none
        self.when = 0.0
        self.first, self.again = first, again

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal and call ``first``; call ``again`` after ``DEBOUNCE_SECONDS``."""
        del frame
        now = time.monotonic()
        if not self.signal:
            self.signal, self.when = number, now
            self.first(number)
        elif now - self.when > DEBOUNCE_SECONDS:
            self.again(number)


@contextmanager
def signals_noted(
    first: Callable[[int], object] = lambda _: None,
    again: Callable[[int], object] = exit_by_signal,
) -> Generator[Request]:
    """Note signals in a Request instead of ending; outside the main thread nothing changes.

    ``first`` is called with the number of the first signal, ``again`` with that of a later one.
    """
    request = Request(first, again)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, request.handle)
    try:
        yield request
    except PeerLostError as error:
        error.stop_requested = bool(request.signal)
        raise
    finally:
        for number in handled:
            signal.signal(number, before[number])
