"""Being asked to stop: a training finishes its step, saves, and ends with status 75.

SIGTERM (a scheduler, ``kill``), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) ask for it.
"""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from modelpar.errors import PeerLostError

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DEBOUNCE_SECONDS: Final = (
    5.0  # s in which further signals are the same request: a terminal, scancel and
)
# torchrun each deliver to the whole group, so that a process gets it twice


def ignore_signals(worker: int) -> None:
    """Let a loader's ``worker`` live through what a whole group is sent: its rank ends it."""
    del worker
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A handler does not learn who sent a signal; who waits for one does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_rank, daemon=True).start()


def _exit_with_rank() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Request:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal = 0  # its number; 0: not asked
        self.when = 0.0

    def hear(self, number: int, frame: Any) -> None:
        """Note the first signal; end at once at one that comes ``SAME`` s after it."""
        del frame
        now = time.monotonic()
        if not self.signal:
            self.signal, self.when = number, now
        elif now - self.when > DEBOUNCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def signals_noted() -> Generator[Request]:
    """Collect signals instead of dying of them; outside the main thread there are none."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.hear) for number in SIGNALS}
    try:
        yield request
    except PeerLostError as error:
        error.asked = bool(request.signal)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
