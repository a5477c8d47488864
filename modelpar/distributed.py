"""Process groups: the 2-D mesh of replicas and columns, and every collective that is used.

No other module calls a collective.  Those that take a tensor check contiguity and dtype first,
since gloo returns wrong numbers, without an error, for tensors that are not contiguous.
"""

import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modelpar import environment, limits
from modelpar.device import set_threads, set_up
from modelpar.environment import Environment
from modelpar.errors import LaunchError, PeerLostError, RunError, one_line

PREPARE_TIMEOUT: Final = timedelta(days=1)  # reading every image of ImageNet once takes hours
DTYPES: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
)
COMM_ERROR: Final = re.compile(r"onnection|imed out|gloo|NCCL|[Ss]ocket")
OTHER_ERROR: Final = re.compile("^CUDA error|out of memory")  # no lost rank, whatever it names


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
    slow_world: dist.ProcessGroup | None = None  # the same, for a wait that may take hours
    readers: dist.ProcessGroup | None = None  # the columns of this replica, if on one host: gloo
    shares_gpu: bool = False  # with other ranks
    closing: ExitStack = field(default_factory=ExitStack)  # closed before the groups end

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
        on_gpu = self.device.type == "cuda"
        net = "two columns" if self.columns > 1 else "the whole net"
        shared = f" x {self.replicas} replicas" if self.replicas > 1 else ""
        if self.world_size == 1:
            place = "one GPU" if on_gpu else "one CPU process"
        elif self.shares_gpu:
            why = "this shows correctness, not speed"
            place = f"{self.world_size} processes that share GPUs (NCCL; {why})"
        else:
            place = f"{self.world_size} " + ("GPUs (NCCL)" if on_gpu else "CPU processes (gloo)")
        threads = "" if on_gpu else f", {self.threads} thread{'s' * (self.threads > 1)} each"
        return f"{net}{shared} on {place}{threads}"

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

    def gather_ints(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Return every rank's integers, 8 bytes each, in rank order.

        A collective of the world.  Raises PeerLostError.
        """
        if self.world is None:
            return [tuple(values)]
        mine = torch.tensor(values, dtype=torch.int64, device="cpu")
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        with comm_errors("all-gather"):
            dist.all_gather(rows, mine, group=self.world)
        return [tuple(row.tolist()) for row in rows]

    def gather_objects(self, value: Any, *, long_timeout: bool = False) -> list[Any]:
        """Return every rank's value, which is pickled, in rank order.

        ``long_timeout``: wait up to a day instead of ``timeout``; a rank that exits is still
        noticed at once.  A collective of the world.  Raises PeerLostError.
        """
        if self.world is None:
            return [value]
        found: list[Any] = [None] * self.world_size
        with comm_errors("all-gather"):
            dist.all_gather_object(found, value, self.slow_world if long_timeout else self.world)
        return found

    @contextmanager
    def all_or_none(self, *, long_timeout: bool = False) -> Generator[None]:
        """Raise on every rank if any rank raises a RunError inside the block.

        A rank raises its own error, or else the first in rank order.  ``long_timeout``: see
        ``gather_objects``.  A collective of the world, so the block must not contain another
        one, which a failing rank would skip.
        """
        error: RunError | None = None
        try:
            yield
        except RunError as caught:
            error = caught
        raised = [one for one in self.gather_objects(error, long_timeout=long_timeout) if one]
        if raised:
            raise error or raised[0]


@contextmanager
def process_mesh(
    columns: int,
    kind: str,
    timeout: float,
    *,
    threads: int | None = None,
    tf32: bool = False,
    deterministic: bool = False,
) -> Generator[Mesh]:
    """Start the process groups that torchrun's variables describe; destroy them on exit.

    After an error on a GPU they are left, see ``exit_if_groups_remain``.
    ``kind`` is ``cuda`` or ``cpu``; ``timeout`` in s holds for every collective; for ``threads``,
    ``tf32`` and ``deterministic`` see ``device``.  A collective of the world.  Raises LaunchError
    if the groups cannot be started.
    """
    env = environment.read()
    replicas = env.num_replicas(columns)
    place = set_up(kind, env.local_rank, tf32=tf32, deterministic=deterministic)
    threads = set_threads(env.local_size, threads)
    if env.world_size == 1:
        yield Mesh(place, threads)
        return
    if env.one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no port is open to other hosts
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # torchrun gives the host's name
    shares_gpu = kind == "cuda" and env.local_size > torch.cuda.device_count()
    if shares_gpu:
        _name_own_host(env)
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=wait,
            device_id=place if kind == "cuda" else None,
        )
        # The groups of init_device_mesh would use torch's default timeout of half an hour.
        grid = torch.arange(env.world_size).view(replicas, columns)
        subgroups: Any = dist.new_subgroups_by_enumeration
        pair, _ = subgroups(grid.tolist(), timeout=wait)
        replica_group, _ = subgroups(grid.t().tolist(), timeout=wait)
        readers, _ = subgroups(grid.tolist(), backend="gloo", timeout=wait)
        world: Any = dist.new_group(backend="gloo", timeout=wait)
        slow_world: Any = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        if re.search("reset|closed", str(error)):
            raise PeerLostError(f"rank {env.rank}: another rank has exited at its start") from None
        if line := limits.reached(error):
            raise LaunchError(f"rank {env.rank}: {line}") from None
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"rank {env.rank} of {env.world_size}: cannot join the process group at {address} "
            f"({one_line(error).partition('. ')[0][:200]}); check that all ranks were started"
        ) from None
    replica, column = divmod(env.rank, columns)
    with ExitStack() as closing:
        closing.callback(dist.destroy_process_group)
        try:
            yield Mesh(
                place,
                threads,
                timeout,
                replicas,
                columns,
                replica,
                column,
                pair=pair if columns > 1 else None,
                replica_group=replica_group if replicas > 1 else None,
                world=world,
                slow_world=slow_world,
                readers=readers if columns > 1 and env.has_ranks(grid[replica].tolist()) else None,
                shares_gpu=shares_gpu,
                closing=closing,
            )
        except BaseException:
            if kind == "cuda":
                closing.pop_all()
            raise


def exit_if_groups_remain(status: int) -> None:
    """Exit with ``status`` at once, if process groups of GPUs were left after an error.

    NCCL ends when all ranks of its group end it, and when no CUDA graph holds its kernels.  It
    waits for both without a limit, also in the destructors at the end of an interpreter.
    """
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _name_own_host(env: Environment) -> None:
    """Make NCCL take this rank for one on a host of its own.

    NCCL refuses two ranks with one GPU of one host ("Duplicate GPU detected", NCCL's init.cc).
    Ranks on several hosts use sockets, and NCCL uses the interface lo only if it is named.
    """
    os.environ["NCCL_HOSTID"] = f"modelpar-{env.rank}"
    if env.one_host:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def unaveraged(net: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which ``data_parallel`` adds gradients up and averages none."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


# -- collectives ----------------------------------------------------------------------------------


@contextmanager
def comm_errors(operation: str) -> Generator[None]:
    """Turn a backend's many-line error into one line: PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if OTHER_ERROR.search(str(error)) or not COMM_ERROR.search(str(error)):
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


def exchange(
    tensor: Tensor, pair: dist.ProcessGroup, received: Tensor | None = None
) -> tuple[Tensor, Callable[[], None]]:
    """Start to send ``tensor`` to the other column and to receive one of equal shape and dtype.

    ``received``: a place for what is received, which may have another shape.  A collective of
    ``pair``.  Returns the tensor that will hold the other column's values, and a function that
    waits for both; until it returns neither tensor may be touched.  Raises PeerLostError.
    """
    _check(tensor, "exchange")
    received = torch.empty_like(tensor) if received is None else received
    _check(received, "exchange")
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
