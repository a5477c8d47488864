"""Process groups: the 2-D mesh of replicas and columns, and every collective that is used.

No other module calls a collective.  Each checks contiguity and dtype first, since gloo returns
wrong numbers, without an error, for tensors that are not contiguous.
"""

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from modelpar import environment
from modelpar.device import choose_device, set_threads, set_up, torch_device
from modelpar.errors import LaunchError, PeerLostError, RunError, error_from_text, one_line

PREPARE_TIMEOUT: Final = timedelta(days=1)  # reading every image of ImageNet once takes hours
POLLS_PER_TIMEOUT: Final = 8  # how often a rank that waits for a disk shows that it is alive
DTYPES: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
)
COMM_ERROR: Final = re.compile(r"onnection|imed out|gloo|NCCL|[Ss]ocket")


@dataclass(frozen=True)
class Mesh:
    """This rank's position among ``replicas`` x ``columns`` ranks, and its process groups."""

    device: torch.device
    threads: int = 1  # of this process
    timeout: float = 120.0  # s after which a rank that does not respond is lost
    replicas: int = 1
    columns: int = 1
    replica: int = 0
    column: int = 0
    pair: dist.ProcessGroup | None = None  # the columns of this replica
    replica_group: dist.ProcessGroup | None = None  # this column in all replicas
    world: dist.ProcessGroup | None = None  # all ranks, over gloo: short messages between CPUs
    patient: dist.ProcessGroup | None = None  # the same, for a wait that may take hours

    @property
    def rank(self) -> int:
        """The rank in the world; the columns of one replica have consecutive ranks."""
        return self.replica * self.columns + self.column

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.replicas * self.columns

    def describe(self) -> str:
        """Return one line about the processes and devices that the run uses."""
        one, many, backend = {
            "cuda": ("GPU", "GPUs", "NCCL"),
            "cpu": ("CPU process", "CPU processes", "gloo"),
        }[self.device.type]
        net = "two columns" if self.columns > 1 else "the whole net"
        shared = f" x {self.replicas} replicas" if self.replicas > 1 else ""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        how = f", {threads} each" if self.device.type == "cpu" else ""
        if self.world_size == 1:
            return f"{net} on one {one}{how}"
        return f"{net}{shared} on {self.world_size} {many} ({backend}){how}"

    def data_parallel(self, net: nn.Module) -> nn.Module:
        """Wrap ``net`` so that gradients are averaged over the replicas, and only over them.

        A collective of ``replica_group``.  Raises PeerLostError.
        """
        if self.replica_group is None:
            return net
        # NCCL: one bucket, so that its all-reduce starts after the pair's last exchange, because
        # two communicators of one GPU must not run unordered.
        size = sum(weight.numel() * weight.element_size() for weight in net.parameters()) >> 20
        with comm_errors("data parallel"):  # compares shapes and broadcasts the weights
            replicated = DistributedDataParallel(
                net,
                process_group=self.replica_group,
                bucket_cap_mb=size + 1 if self.device.type == "cuda" else None,
            )
        # Buffers are constant.  The argument of this name is deprecated in torch 2.14, and its
        # successor is missing in torch 2.11.
        replicated.broadcast_buffers = False
        return replicated

    # -- messages between all ranks ---------------------------------------------------------------

    def gather_ints(
        self, values: Sequence[int], *, patient: bool = False
    ) -> list[tuple[int, ...]]:
        """Return every rank's integers, 8 bytes each, in rank order.

        ``patient``: wait up to a day instead of ``timeout``; a rank that exits is still noticed
        at once.  A collective of the world.  Raises PeerLostError.
        """
        if self.world is None or self.patient is None:
            return [tuple(values)]
        mine = torch.tensor(values, dtype=torch.int64, device="cpu")
        rows = _all_gather(mine, self.patient if patient else self.world)
        return [tuple(row.tolist()) for row in rows]

    def gather_text(self, text: str, *, patient: bool = False) -> list[str]:
        """Return every rank's text, in rank order; see ``gather_ints``."""
        if self.world is None:
            return [text]
        encoded = text.encode(errors="backslashreplace")
        sizes = [size for (size,) in self.gather_ints((len(encoded),), patient=patient)]
        mine = torch.zeros(max(1, *sizes), dtype=torch.uint8, device="cpu")
        if encoded:
            mine[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        rows = _all_gather(mine, self.world)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks.  A collective of the world.  Raises PeerLostError."""
        self.gather_ints((0,))

    def wait_until_all(self, done: Callable[[float], bool]) -> None:
        """Wait until ``done`` returns true on every rank.

        ``done`` is called repeatedly with the number of seconds that it may block.  A slow rank
        responds in between; a dead one is lost after ``timeout``.  A collective of the world.
        """
        pause = self.timeout / POLLS_PER_TIMEOUT
        while not all(ready for (ready,) in self.gather_ints((int(done(pause)),))):
            pass

    @contextmanager
    def all_or_none(self, *, patient: bool = False) -> Generator[None]:
        """Raise on every rank if any rank raises a RunError inside the block.

        A rank raises its own error, or else the first in rank order.  ``patient``: see
        ``gather_ints``.  A collective of the world, so the block must not contain another one,
        which a failing rank would skip.
        """
        error: RunError | None = None
        try:
            yield
        except RunError as caught:
            error = caught
        line = f"{error.status} {one_line(error)}" if error else ""
        if first := next(filter(None, self.gather_text(line, patient=patient)), ""):
            raise error or error_from_text(first)


@contextmanager
def process_mesh(
    columns: int,
    device: str = "auto",
    timeout: float = 120.0,
    *,
    threads: int | None = None,
    tf32: bool = False,
) -> Generator[Mesh]:
    """Start the process groups that torchrun's variables describe; destroy them on exit.

    ``timeout`` in s holds for every collective.  For ``threads`` and ``tf32`` see
    ``device.set_threads`` and ``device.set_up``.  A world of one process needs no group.  A
    collective of the world.  Raises LaunchError if the groups cannot be started.
    """
    env = environment.read()
    replicas = env.num_replicas(columns, 1)
    kind = choose_device(device, env.local_size)
    place = torch_device(kind, env.local_rank)
    set_up(place, tf32=tf32)
    threads = set_threads(env.local_size, threads)
    if env.world_size == 1:
        yield Mesh(place, threads)
        return
    if kind == "cuda" and not dist.is_nccl_available():
        raise LaunchError("this torch has no NCCL; install one with NCCL, or use device=cpu")
    if env.one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no port is open to other hosts
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=wait,
            device_id=place if kind == "cuda" else None,
        )
        # The groups of init_device_mesh would use torch's default timeout of half an hour.
        grid = torch.arange(env.world_size).view(replicas, columns)
        pair, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=wait)
        replica_group, _ = dist.new_subgroups_by_enumeration(grid.t().tolist(), timeout=wait)
        axes = DeviceMesh.from_group(
            cast("list[dist.ProcessGroup]", [replica_group, pair]),
            kind,
            grid,
            mesh_dim_names=("replica", "column"),
        )
        world = dist.new_group(backend="gloo", timeout=wait)
        patient = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        if re.search("reset|closed", str(error)):
            raise PeerLostError(f"rank {env.rank}: another rank has exited at its start") from None
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"rank {env.rank} of {env.world_size}: cannot join the process group at {address} "
            f"({one_line(error).partition('. ')[0][:200]}); check that all ranks were started"
        ) from None
    try:
        replica, column = axes.get_coordinate() or (0, 0)
        yield Mesh(
            place,
            threads,
            timeout,
            replicas,
            columns,
            replica,
            column,
            pair=axes.get_group("column") if columns > 1 else None,
            replica_group=axes.get_group("replica") if replicas > 1 else None,
            world=cast("dist.ProcessGroup", world),
            patient=cast("dist.ProcessGroup", patient),
        )
    finally:
        dist.destroy_process_group()


# -- collectives ----------------------------------------------------------------------------------


@contextmanager
def comm_errors(operation: str) -> Generator[None]:
    """Turn a backend's many-line error into one line: PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if not COMM_ERROR.search(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", one_line(error)).partition(". ")[0]
        raise PeerLostError(
            f"{operation}: another rank has exited or does not respond ({reason[:160]})"
        ) from None


def _check(tensor: Tensor, operation: str) -> None:
    """Raise ValueError for a tensor that gloo would garble."""
    if not tensor.is_contiguous():
        raise ValueError(f"{operation}: a tensor of shape {tuple(tensor.shape)} is not contiguous")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{operation}: a tensor of {tensor.dtype} cannot be sent")


def exchange(tensor: Tensor, pair: dist.ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
    """Start to send ``tensor`` to the other column and to receive one of equal shape and dtype.

    A collective of ``pair``.  Returns the tensor that will hold the other column's values, and a
    function that waits for both; until it returns neither tensor may be touched.  Raises
    PeerLostError.
    """
    _check(tensor, "exchange")
    received = torch.empty_like(tensor)
    peer = dist.get_global_rank(pair, 1 - dist.get_rank(pair))
    with comm_errors("exchange"):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, peer, group=pair),
                dist.P2POp(dist.irecv, received, peer, group=pair),
            ]
        )

    def wait() -> None:
        with comm_errors("exchange"):
            for work in works:
                work.wait()

    return received, wait


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` in place over ``group`` (None: this process alone) and return it.

    A collective of ``group``.  Raises PeerLostError.
    """
    if group is not None:
        _check(tensor, "all-reduce")
        with comm_errors("all-reduce"):
            dist.all_reduce(tensor, group=group)
    return tensor


def _all_gather(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the tensor of each rank of ``group``; all have the same shape."""
    _check(mine, "all-gather")
    rows = [torch.empty_like(mine) for _ in range(group.size())]
    with comm_errors("all-gather"):
        dist.all_gather(rows, mine, group=group)
    return rows
