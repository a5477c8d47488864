"""Signals: noted once however often they are delivered; a later one ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import children, still_alive

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
def test_a_signal_is_noted_and_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.signal(one, signal.SIG_DFL) for one in shutdown.SIGNALS]
    try:
        with shutdown.signals_noted() as request:
            assert request.signal == 0
            os.kill(os.getpid(), number)
            assert request.signal == number
        assert all(signal.getsignal(one) == signal.SIG_DFL for one in shutdown.SIGNALS)
    finally:
        for one, handler in zip(shutdown.SIGNALS, before, strict=True):
            signal.signal(one, handler)


def test_an_ignored_signal_stays_ignored_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with shutdown.signals_noted() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_later_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], timeout=20, check=False)
    assert done.returncode == -signal.SIGTERM


def test_children_are_killed_with_their_process_groups() -> None:
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    with subprocess.Popen(command, start_new_session=True) as child:
        deadline = time.monotonic() + 20
        while not (grandchildren := children(child.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGSTOP)  # it runs no signal handler
        shutdown.kill_children(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGKILL
    assert not still_alive(grandchildren, 20)
