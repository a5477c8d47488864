"""A request to stop: heard once, however often it is delivered; a later one ends at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from modelpar import shutdown

LATE = """
import os, signal, time
from modelpar import shutdown
shutdown.DEBOUNCE_SECONDS = 0.2
with shutdown.signals_noted() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # the same request
    assert request.signal == signal.SIGTERM
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
"""


@pytest.mark.parametrize("number", shutdown.SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in shutdown.SIGNALS]
    with shutdown.signals_noted() as request:
        assert request.signal == 0
        os.kill(os.getpid(), number)
        assert request.signal == number
    assert [signal.getsignal(one) for one in shutdown.SIGNALS] == before


def test_a_later_signal_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], timeout=20, check=False)
    assert done.returncode == -signal.SIGTERM


def test_outside_the_main_thread_nothing_is_touched() -> None:
    heard: list[int] = []

    def work() -> None:
        with shutdown.signals_noted() as request:
            heard.append(request.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [0]
