"""Other processes, seen from outside: their children, their signals, and whether they run."""

import os
import time
from contextlib import suppress
from pathlib import Path


def children(parent: int, *, deep: bool = False) -> list[int]:
    """Return the process ids of the children of a process; ``deep`` adds their descendants."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = path.read_text().partition(" ")
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                found.append(int(number))
    return found + ([one for child in found for one in children(child, deep=True)] * deep)


def alive(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    with suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    return False


def still_alive(processes: list[int], seconds: float = 0) -> list[int]:
    """Wait for processes to end; return those that are alive after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def send(number: int, process: int) -> None:
    """Send a signal to a process, which may have ended."""
    with suppress(OSError):
        os.kill(process, number)
