"""What the launcher tells this process, and the process's tie to it."""

import ctypes
import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpar.errors import LaunchError, one_line

PR_SET_PDEATHSIG: Final = 1  # prctl.h
MEETING: Final = 25.0  # s that a process tries to reach the others before it says that it cannot
LAST_PORT: Final = 65535
RETRY: Final = 0.2  # s between two tries


# -- what the launcher says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A process among those that the launcher started; 0 of 1 where there is no launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    one_host: bool = True  # all processes are known to be on this host
    attempt: int = 0  # how often torchrun's agent has started it again
    agent_has_store: bool = False  # the store is the agent's, not rank 0's


def read() -> Environment:
    """Read the launcher's environment; raises LaunchError for what no launcher says."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Environment()
    rank, size = integer("RANK"), integer("WORLD_SIZE")
    if rank >= size:
        raise LaunchError(f"RANK={rank}: there are WORLD_SIZE={size}, numbered from 0")
    return Environment(
        rank,
        size,
        integer("LOCAL_RANK", 0),
        integer("LOCAL_WORLD_SIZE", size),
        integer("LOCAL_WORLD_SIZE", 0) == size,
        integer("TORCHELASTIC_RESTART_COUNT", 0),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def exit_with_parent() -> None:
    """Have the kernel ask this rank to stop when its launcher is gone, even by SIGKILL.

    Raises LaunchError where it is gone already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if orphaned():  # before it could be watched
        raise LaunchError("the launcher is gone; start it again")


def orphaned() -> bool:
    """Whether the launcher that started this process is gone already."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        return os.getppid() != parent.pid
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != 1:
        return False
    with suppress(OSError):  # torchrun's agent may itself be the first process, of a container
        return b"torch" not in Path("/proc/1/cmdline").read_bytes()
    return False


def is_local_rank0() -> bool:
    """Whether this process is the one of its host that says why a run ends."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def master() -> tuple[str, int]:
    """Return host and port where the processes meet; raises LaunchError."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise LaunchError(
            "MASTER_ADDR is not set: start with torchrun, or name the host of rank 0"
        )
    port = integer("MASTER_PORT")
    if not 0 < port <= LAST_PORT:
        raise LaunchError(f"MASTER_PORT={port}: give 1 to {LAST_PORT}")
    return address, port


def integer(name: str, default: int | None = None) -> int:
    """Return a whole number from the environment; raises LaunchError where it is none."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        said = f"{name}={text}" if text else f"{name} is not set"
        raise LaunchError(f"{said}: the launcher must set a whole number; start with torchrun")
    return int(text)


def check_world(columns: int, replicas: int, size: int) -> int:
    """Return how many replicas ``size`` processes make; raises LaunchError where none fit."""
    if size % columns:
        raise LaunchError(
            f"columns={columns}: a world of {size} is no multiple of it; "
            f"give --nproc-per-node {columns * replicas}, or columns=1"
        )
    if replicas > 1 and replicas * columns != size:
        raise LaunchError(
            f"replicas={replicas}: needs a world of {replicas * columns}, this one is {size}; "
            f"give --nproc-per-node {replicas * columns}"
        )
    return size // columns


def launcher() -> str:
    """Name the launcher's process that started this one: another start has another name."""
    return f"{socket.gethostname()} {os.getppid()}"


def check_network(where: Environment, timeout: float) -> None:
    """Raise LaunchError where this process cannot reach the others, within ``MEETING``.

    torchrun's agents have met at the address before; what it starts may just be slow, and has
    ``timeout``.  torch itself would try for long, and print a page.
    """
    address, port = master()
    known = {name for _, name in socket.if_nameindex()}
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME={name}: this host has {', '.join(sorted(known))}"
            )
    if where.rank == 0 and not where.agent_has_store:  # it is the one that listens
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise LaunchError(f"MASTER_PORT={port}: {one_line(error)}; give another") from None
        return
    reason = ""
    vouched = "TORCHELASTIC_RUN_ID" in os.environ
    deadline = time.monotonic() + (max(timeout, MEETING) if vouched else MEETING)
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=MEETING / 5):
                return
        except OSError as error:  # a name that is not found may be one that is not there yet
            reason = one_line(error)
            time.sleep(RETRY)
    raise LaunchError(
        f"rank {where.rank}: nothing answers at MASTER_ADDR={address} MASTER_PORT={port} "
        f"({reason}); give the host and port of rank 0, and see that it runs"
    )
