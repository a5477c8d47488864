"""Two hosts on one machine, as ``launch/slow_link.sh`` makes them, and the wire between them."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from modelpar.errors import LaunchError

CLONE_NEWNET: Final = 0x40000000  # sched.h
INTERFACE: Final = "wire"  # launch/slow_link.sh
BURST_S: Final = 0.002  # what the bucket holds, as time at the rate: two of the kernel's ticks
LEAST_BURST: Final = 128 << 10  # bytes: two of the largest segments
QUEUE_S: Final = 0.05  # that a packet may wait for the bucket


def enter(host: str) -> None:
    """Move this process into a network namespace of ``ip netns``; raises LaunchError."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = Path("/run/netns", host)
    if not place.exists():
        raise LaunchError(
            f"link.hosts={host}: no such network namespace; start with launch/slow_link.sh"
        )
    with place.open() as namespace:
        refused = libc.setns(namespace.fileno(), CLONE_NEWNET)
    if refused:
        raise LaunchError(f"link.hosts={host}: {os.strerror(ctypes.get_errno())}")


def limit(hosts: Sequence[str], rate: float | None) -> None:
    """Let each of ``hosts`` send ``rate`` Mbit/s; None: as fast as it goes."""
    for host in hosts:
        tc = ["tc", "-n", host, "qdisc"]
        wire = ["dev", INTERFACE, "root"]
        if rate is None:
            subprocess.run([*tc, "del", *wire], check=False, capture_output=True)  # noqa: S603
            continue
        burst = max(LEAST_BURST, int(rate * 1e6 / 8 * BURST_S))
        bucket = ["rate", f"{rate:g}mbit", "burst", f"{burst}b", "latency", f"{QUEUE_S * 1e3:g}ms"]
        done = subprocess.run(  # noqa: S603
            [*tc, "replace", *wire, "tbf", *bucket], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise LaunchError(f"link.rates={rate:g}: tc says {done.stderr.strip()}")


def sent() -> int:
    """Return the bytes that this host's interfaces have sent, loopback included."""
    rows = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(row.partition(":")[2].split()[8]) for row in rows)
