"""This machine, and what the launcher says of this process: checked before processes meet."""

import ctypes
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from modelpar.errors import LaunchError, SettingsError, one_line

PR_SET_PDEATHSIG: Final = 1  # prctl.h
M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_MAX: Final = -4  # malloc.h
MEETING: Final = 25.0  # s that a process tries to reach the others before it says that it cannot
LAST_PORT: Final = 65535
RETRY: Final = 0.2  # s between two tries
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where torch's loaders pass their batches
PREFETCHED: Final = 2  # batches a loader process has ready: torch's default


# -- what the launcher says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A process among those that the launcher started; 0 of 1 where there is no launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    one_host: bool = True  # all processes are known to be on this host
    attempt: int = 0  # how often torchrun's agent has started it again
    agent_has_store: bool = False  # the store is the agent's, not rank 0's


def place() -> Place:
    """Read the launcher's environment; raises LaunchError for what no launcher says."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Place()
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank >= size:
        raise LaunchError(f"RANK={rank}: there are WORLD_SIZE={size}, numbered from 0")
    return Place(
        rank,
        size,
        _number("LOCAL_RANK", 0),
        _number("LOCAL_WORLD_SIZE", size),
        _number("LOCAL_WORLD_SIZE", 0) == size,
        _number("TORCHELASTIC_RESTART_COUNT", 0),
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def die_with_launcher() -> None:
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


def speaks() -> bool:
    """Whether this process is the one of its host that says why a run ends."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def master() -> tuple[str, int]:
    """Return host and port where the processes meet; raises LaunchError."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise LaunchError(
            "MASTER_ADDR is not set: start with torchrun, or name the host of rank 0"
        )
    port = _number("MASTER_PORT")
    if not 0 < port <= LAST_PORT:
        raise LaunchError(f"MASTER_PORT={port}: give 1 to {LAST_PORT}")
    return address, port


def _number(name: str, default: int | None = None) -> int:
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


def check_network(where: Place, timeout: float) -> None:
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


# -- GPUs ----------------------------------------------------------------------------------------


def choose_device(device: str, local_processes: int) -> str:
    """Return ``cuda`` or ``cpu`` for the setting ``device``; auto takes GPUs if each rank has one.

    Raises SettingsError where ``device=cuda`` asks for more GPUs than there are.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if found >= local_processes else "cpu"
    if device == "cuda" and found < local_processes:
        raise SettingsError(
            f"device=cuda: {found} GPUs for {local_processes} processes on this host; "
            "give columns=1 for one GPU, or device=cpu"
        )
    return device


def check_precision(device: str, precision: str) -> None:
    """Raise SettingsError for bfloat16 on a GPU that only emulates it."""
    if device != "cuda" or precision != "bfloat16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingsError("precision=bfloat16: this GPU has none; give precision=float32")


# -- cores and memory ----------------------------------------------------------------------------


def keep_memory() -> bool:
    """Make glibc keep what is freed; return whether this libc can.

    By default big buffers go back to the system at each step and are faulted in anew, which cost
    a third of a step here (224 pixels, two processes: 21 and 30 images/s).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def share_cores(processes: int, threads: int | None = None) -> int:
    """Give this process its share of the host's cores; return its number of threads.

    ``threads`` None: OMP_NUM_THREADS where it says more than torchrun's own 1, or the cores this
    process may use divided by the host's ``processes``.
    """
    if threads is None:
        given = _number("OMP_NUM_THREADS", 1)
        threads = given if given > 1 else max(1, cores() // processes)
    torch.set_num_threads(threads)
    return threads


def crowding(threads: int) -> str:
    """Return a warning where this host's processes have more threads than cores, else nothing."""
    processes = place().local_size
    if threads * processes <= cores():
        return ""
    return (
        f"{processes} processes of {threads} threads on {cores()} cores get in each other's way; "
        "leave threads and OMP_NUM_THREADS out"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory that it asked for, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def memory(device: torch.device) -> str:
    """Name ``device`` with the memory that it had in use at most, where that is known."""
    if device.type != "cuda":
        return f"this host ({device})"
    peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    return f"{device} ({peak / 1e6:.0f} of {total / 1e6:.0f} MB)"


def check_shared_memory(workers: int, batch_bytes: int, processes: int) -> None:
    """Raise LaunchError where the loaders' batches do not fit into /dev/shm.

    A loader that finds no room there dies with a bus error.
    """
    needed = workers * PREFETCHED * batch_bytes * processes
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise LaunchError(
            f"{SHARED_MEMORY}: {workers} loader processes for each of {processes} need "
            f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make it larger "
            "(docker run --shm-size), or give workers=0"
        )


def ended_loader(error: Exception) -> str:
    """Say in one line that a loader's process was ended, if that is what ``error`` says; else "".

    torch says it by a RuntimeError at any place of the main thread, or of who reads the batch;
    the connection by which a batch comes may break before.
    """
    told = f"{error} {error.__cause__ or ''}"
    broken = isinstance(error, (ConnectionError, EOFError)) and "Caught" not in told  # by a worker
    if not broken and "DataLoader worker (pid" not in told:
        return ""
    number = re.search(r"killed by signal: ([\w ]+)", told)
    how = f" by signal: {number[1].strip()}" if number else ""
    return (
        f"a loader process was ended{how}, likely out of memory; "
        f"give fewer workers=, or more memory, also for {SHARED_MEMORY}"
    )


def set_up(device: torch.device, *, tf32: bool) -> bool:
    """Make this process fast on ``device``; return whether freed memory is kept.

    ``tf32`` lets a GPU round float32 products.
    """
    if device.type == "cpu":
        return keep_memory()
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes never change
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32  # torch's own default rounds convolutions
    return False  # torch keeps a GPU's memory itself


@cache
def compiler_complaint(device: torch.device) -> str:
    """Return why torch.compile does not work here, in one line; empty where it does."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # CUDA without a GPU
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001 - no compiler, no headers, a full disk: all the same
        return one_line(error)[:160]
    return ""
