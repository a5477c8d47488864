"""The link between the two network namespaces that ``launch/slow_link.sh`` creates."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from modelpar.errors import LaunchError

CLONE_NEWNET: Final = 0x40000000  # sched.h
INTERFACE: Final = "wire"  # launch/slow_link.sh
BURST_SECONDS: Final = 0.002  # what the bucket holds: two kernel ticks at the rate
SMALLEST_BURST: Final = 128 << 10  # bytes: two of the largest segments


def enter(host: str) -> None:
    """Move this process into a network namespace of ``ip netns``; raises LaunchError."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = Path("/run/netns", host)
    if not place.exists():
        raise LaunchError(
            f"link.hosts={host}: no such network namespace; start with launch/slow_link.sh"
        )
    with place.open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise LaunchError(f"link.hosts={host}: {os.strerror(ctypes.get_errno())}")


def limit(hosts: Sequence[str], rate: float | None) -> None:
    """Limit each of ``hosts`` to sending ``rate`` Mbit/s, None: unlimited; raises LaunchError."""
    for host in hosts:
        command = ["tc", "-n", host, "qdisc", "del", "dev", INTERFACE, "root"]
        if rate is not None:
            burst = max(SMALLEST_BURST, int(rate * 1e6 / 8 * BURST_SECONDS))
            command[4] = "replace"
            command += f"tbf rate {rate:g}mbit burst {burst}b latency 50ms".split()
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode and rate is not None:  # there may be no limit to delete
            raise LaunchError(f"link.rates={rate:g}: tc failed: {done.stderr.strip()}")


def bytes_sent() -> int:
    """Return the bytes that this namespace's interfaces have sent, including loopback."""
    rows = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(row.partition(":")[2].split()[8]) for row in rows)
