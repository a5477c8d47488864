"""Processes and devices: the group, the 2-D mesh of replicas and columns, and its collectives.

This is the one place that calls a collective.  Each checks contiguity and dtype first, since gloo
returns wrong numbers, without an error, for tensors that are not contiguous.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Final, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from modelpar.errors import LaunchError, PeerLostError, SettingsError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torch import Tensor, nn

AXES: Final = ("replica", "column")
TEXT_BYTES: Final = 4096
DISK_PATIENCE: Final = 10  # times ``comm.timeout``
M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_MAX: Final = -4  # malloc.h
CARRIED: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
)


def generator(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that is a pure function of ``seed`` and ``keys``, on ``device``.

    The keys say what is drawn (a layer, an epoch, a step), never which rank draws it: that is
    what makes one process and two follow the same trajectory.
    """
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def digest(tensors: Iterable[Tensor]) -> int:
    """Return 63 bits of a hash of the tensors' bytes."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(content.numpy().data)
    return int.from_bytes(total.digest(), "little") >> 1


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among ``replicas`` x ``columns`` processes, and its groups."""

    device: torch.device
    threads: int = 1  # of this process
    keeps_memory: bool = False  # freed memory stays with the process, see ``keep_memory``
    replicas: int = 1
    columns: int = 1
    replica: int = 0
    column: int = 0
    pair: dist.ProcessGroup | None = None  # the columns of this replica
    peers: dist.ProcessGroup | None = None  # this column in all replicas
    control: dist.ProcessGroup | None = None  # all, over gloo: short messages between CPUs
    aside: dist.ProcessGroup | None = None  # the same, for a thread beside the training

    def beside(self) -> Mesh:
        """Return the mesh for one thread beside the main one: its messages do not mix."""
        return replace(self, control=self.aside)

    @property
    def rank(self) -> int:
        """The process's number in the world: columns of one replica are neighbours."""
        return self.replica * self.columns + self.column

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.replicas * self.columns

    def describe(self) -> str:
        """Say in one line what the run stands on."""
        one, many, backend = {
            "cuda": ("GPU", "GPUs", "NCCL"),
            "cpu": ("CPU process", "CPU processes", "gloo"),
        }[self.device.type]
        net = "two columns" if self.columns > 1 else "the whole net"
        shared = f" x {self.replicas} replicas" if self.replicas > 1 else ""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        kept = ", freed memory kept" if self.keeps_memory else ""
        how = f", {threads} each{kept}" if self.device.type == "cpu" else ""
        if self.world_size == 1:
            return f"{net} on one {one}{how}"
        return f"{net}{shared} on {self.world_size} {many} ({backend}){how}"

    def replicate(self, net: nn.Module) -> nn.Module:
        """Wrap ``net`` so that its gradients are averaged over the replicas, and only there."""
        if self.peers is None:
            return net
        # NCCL: one bucket, so that the replicas' all-reduce starts after the pair's last crossing;
        # two communicators of one GPU must not run unordered.
        megabytes = (
            sum(weight.numel() * weight.element_size() for weight in net.parameters()) >> 20
        )
        return DistributedDataParallel(
            net,
            process_group=self.peers,
            forward_sync_buffers=False,  # they are constant
            bucket_cap_mb=megabytes + 1 if self.device.type == "cuda" else None,
        )


def world_size() -> int:
    """Return the number of processes the launcher started (1 without a launcher)."""
    return _env_int("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return this process's number on its host."""
    return _env_int("LOCAL_RANK", 0)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        message = f"{name}={text}: the launcher must set a whole number; start with torchrun"
        raise LaunchError(message)
    return int(text)


def choose_device(device: str, local_processes: int) -> str:
    """Return ``cuda`` or ``cpu`` for the setting ``device``; auto takes GPUs if each rank has one.

    Raises SettingsError where ``device=cuda`` asks for more GPUs than there are.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if found >= local_processes else "cpu"
    if device == "cuda" and found < local_processes:
        message = (
            f"device=cuda: {found} GPUs for {local_processes} processes on this host; "
            "give columns=1 for one GPU, or device=cpu"
        )
        raise SettingsError(message)
    return device


def check_world(columns: int, replicas: int, size: int) -> int:
    """Return how many replicas ``size`` processes make; raises SettingsError where none fit."""
    if size % columns:
        message = (
            f"columns={columns}: a world of {size} is no multiple of it; "
            f"give --nproc-per-node {columns * replicas}, or columns=1"
        )
        raise SettingsError(message)
    if replicas > 1 and replicas * columns != size:
        message = (
            f"replicas={replicas}: needs a world of {replicas * columns}, this one is {size}; "
            f"give --nproc-per-node {replicas * columns}"
        )
        raise SettingsError(message)
    return size // columns


def keep_memory() -> bool:
    """Make glibc keep what is freed; return whether this libc can.

    By default big buffers go back to the system at each step and are faulted in anew, which cost
    a third of a step here (224 pixels, two processes: 21 and 30 images/s).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def share_cores(processes: int, threads: int | None = None) -> int:
    """Give this process its share of the host's cores; return its number of threads.

    ``threads`` None: OMP_NUM_THREADS where it says more than torchrun's own 1, or the cores this
    process may use divided by the host's ``processes``.
    """
    if threads is None:
        given = _env_int("OMP_NUM_THREADS", 1)
        threads = given if given > 1 else max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)
    return threads


@cache
def compiler_complaint(device: torch.device) -> str:
    """Return why torch.compile does not work here, in one line; empty where it does."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # CUDA without a GPU
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001 - no compiler, no headers, a full disk: all the same
        return one_line(error)[:160]
    return ""


def _set_up(device: torch.device, *, tf32: bool) -> bool:
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


@contextmanager
def opened(
    columns: int,
    device: str = "auto",
    timeout: float = 120.0,
    *,
    threads: int | None = None,
    tf32: bool = False,
) -> Generator[Mesh]:
    """Start the process group that the launcher's environment describes; end it on the way out.

    ``timeout`` in s holds for every collective.  A world of one process needs no group.  For
    ``threads`` and ``tf32`` see ``share_cores`` and ``_set_up``.  Raises LaunchError where the
    group does not start.
    """
    size = world_size()
    replicas = check_world(columns, 1, size)
    local = _env_int("LOCAL_WORLD_SIZE", size)
    kind = choose_device(device, local)
    place = torch.device(kind, local_rank()) if kind == "cuda" else torch.device("cpu")
    kept = _set_up(place, tf32=tf32)
    threads = share_cores(local, threads)
    if size == 1:
        yield Mesh(place, threads=threads, keeps_memory=kept)
        return
    if _env_int("LOCAL_WORLD_SIZE", 0) == size:  # one host: no port is open to others
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=wait,
            device_id=place if kind == "cuda" else None,
        )
        # The groups of init_device_mesh would wait for torch's default of half an hour.
        grid = torch.arange(size).view(replicas, columns)
        pair, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=wait)
        peers, _ = dist.new_subgroups_by_enumeration(grid.t().tolist(), timeout=wait)
        control = dist.new_group(backend="gloo", timeout=wait)
        # It waits for disks, not for the net: a peer that stops is noticed by the others.
        aside = dist.new_group(backend="gloo", timeout=wait * DISK_PATIENCE)
        groups = cast("list[dist.ProcessGroup]", [peers, pair])
        axes = DeviceMesh.from_group(groups, kind, grid, mesh_dim_names=AXES)
    except (RuntimeError, ValueError) as error:
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        message = f"no process group at {master}: {one_line(error)[:300]}"
        raise LaunchError(message) from None
    try:
        replica, column = axes.get_coordinate() or (0, 0)
        yield Mesh(
            place,
            threads=threads,
            keeps_memory=kept,
            replicas=replicas,
            columns=columns,
            replica=replica,
            column=column,
            pair=axes.get_group("column") if columns > 1 else None,
            peers=axes.get_group("replica") if replicas > 1 else None,
            control=cast("dist.ProcessGroup", control),
            aside=cast("dist.ProcessGroup", aside),
        )
    finally:
        dist.destroy_process_group()


LOST: Final = re.compile(r"onnection|imed out|gloo|NCCL|[Ss]ocket")


@contextmanager
def peer_named(operation: str) -> Generator[None]:
    """Turn a backend's many-line error into one line that says who is gone: PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", one_line(error)).partition(". ")[0]
        message = f"{operation}: the other process is gone or silent ({reason[:160]})"
        raise PeerLostError(message) from None


def _check(tensor: Tensor, operation: str) -> None:
    if not tensor.is_contiguous():
        message = f"{operation}: a tensor of shape {tuple(tensor.shape)} is not contiguous"
        raise ValueError(message)
    if tensor.dtype not in CARRIED:
        message = f"{operation}: {tensor.dtype} is not carried"
        raise ValueError(message)


def swap(tensor: Tensor, pair: dist.ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
    """Start one send and one receive of equal shape and dtype between the two columns.

    A collective of ``pair``.  Returns the tensor that will hold the peer's values, and a function
    that waits for both; until then neither tensor may be touched.  Raises PeerLostError.
    """
    _check(tensor, "swap")
    received = torch.empty_like(tensor)
    peer = dist.get_global_rank(pair, 1 - dist.get_rank(pair))
    with peer_named("swap"):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, peer, group=pair),
                dist.P2POp(dist.irecv, received, peer, group=pair),
            ]
        )

    def wait() -> None:
        with peer_named("swap"):
            for work in works:
                work.wait()

    return received, wait


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` in place over ``group`` (None: this process alone) and return it."""
    if group is not None:
        _check(tensor, "sum")
        with peer_named("sum"):
            dist.all_reduce(tensor, group=group)
    return tensor


def tell(values: Sequence[int], mesh: Mesh) -> Callable[[], list[tuple[int, ...]]]:
    """Start telling every process these whole numbers; return a function that waits for all's.

    A collective of the whole world, of 8 bytes a number.  What it returns is in rank order.
    """
    if mesh.control is None:
        return lambda: [tuple(values)]
    own = torch.tensor(values, dtype=torch.int64, device="cpu")
    _check(own, "tell")
    told = [torch.empty_like(own) for _ in range(mesh.world_size)]
    with peer_named("tell"):
        work = dist.all_gather(told, own, group=mesh.control, async_op=True)

    def wait() -> list[tuple[int, ...]]:
        with peer_named("tell"):
            work.wait()
        return [tuple(one.tolist()) for one in told]

    return wait


def gather_text(text: str, mesh: Mesh) -> list[str]:
    """Return every process's ``text``, in rank order, cut at 4 KiB.

    A collective of the whole world.
    """
    if mesh.control is None:
        return [text]
    own = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device="cpu")
    encoded = text.encode()[:TEXT_BYTES]
    if encoded:
        own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    _check(own, "gather")
    texts = [torch.empty_like(own) for _ in range(mesh.world_size)]
    with peer_named("gather"):
        dist.all_gather(texts, own, group=mesh.control)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in texts]


def first_complaint(complaint: str, mesh: Mesh) -> str:
    """Return the first process's complaint that is not empty, the same on all; else nothing.

    A collective of the whole world.
    """
    return next(filter(None, gather_text(complaint, mesh)), "")
