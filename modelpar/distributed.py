"""Processes and devices: the group, the 2-D mesh of replicas and columns, and its collectives.

This is the one place that calls a collective.  Each checks contiguity and dtype first, since gloo
returns wrong numbers, without an error, for tensors that are not contiguous; with ``comm.check``
the processes also tell each other what they are about to do, and stop where it differs.
"""

import json
import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Event, Thread
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from modelpar import environment
from modelpar.device import choose_device, set_threads, set_up, torch_device
from modelpar.errors import LaunchError, PeerLostError, RunError, error_from_text, one_line

AXES: Final = ("replica", "column")
TEXT_BYTES: Final = 4096
CALL_BYTES: Final = 128  # of a collective's name, shape and number
TOLD_WITHIN: Final = 5 * environment.RETRY  # s in which those that wait read why another failed
DISK_PATIENCE: Final = 10  # times ``comm.timeout``
SLICES: Final = 8  # of ``comm.timeout``: who waits for something else shows that it lives
CARRIED: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among ``replicas`` x ``columns`` processes, and its groups."""

    device: torch.device
    threads: int = 1  # of this process
    keeps_memory: bool = False  # freed memory stays with the process, see ``keep_memory``
    timeout: float = 120.0  # s after which a process that does not answer is lost
    replicas: int = 1
    columns: int = 1
    replica: int = 0
    column: int = 0
    pair: dist.ProcessGroup | None = None  # the columns of this replica
    replica_group: dist.ProcessGroup | None = None  # this column in all replicas
    world: dist.ProcessGroup | None = None  # all, over gloo: short messages between CPUs
    aside: dist.ProcessGroup | None = None  # the same, for a thread beside the training

    def beside(self) -> "Mesh":
        """Return the mesh for one thread beside the main one: its messages do not mix."""
        return replace(self, world=self.aside)

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

    def data_parallel(self, net: nn.Module) -> nn.Module:
        """Wrap ``net`` so that its gradients are averaged over the replicas, and only there.

        A collective of ``replica_group``.  Raises PeerLostError.
        """
        if self.replica_group is None:
            return net
        # NCCL: one bucket, so that the replicas' all-reduce starts after the pair's last crossing;
        # two communicators of one GPU must not run unordered.
        megabytes = (
            sum(weight.numel() * weight.element_size() for weight in net.parameters()) >> 20
        )
        with comm_errors("replicate"):  # shapes are compared, and the weights sent round
            replicated = DistributedDataParallel(
                net,
                process_group=self.replica_group,
                bucket_cap_mb=megabytes + 1 if self.device.type == "cuda" else None,
            )
        # Buffers are constant.  The argument for this has another name in each torch version.
        replicated.broadcast_buffers = False
        return replicated

    def gather_ints(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Return every rank's whole numbers, 8 bytes each, in rank order.

        A collective of the whole world.
        """
        if self.world is None:
            return [tuple(values)]
        own = torch.tensor(values, dtype=torch.int64, device="cpu")
        _check(own, "gather", self.world)
        told = [torch.empty_like(own) for _ in range(self.world_size)]
        with comm_errors("gather"):
            dist.all_gather(told, own, group=self.world)
        return [tuple(one.tolist()) for one in told]

    def wait_until_all(self, done: Callable[[float], bool]) -> None:
        """Wait until ``done`` is true on every process.

        ``done`` is called repeatedly with the number of seconds that it may block.  A slow
        rank answers in between; a dead one times out after ``comm.timeout``.  A collective of the
        world.
        """
        while not all(told for (told,) in self.gather_ints((int(done(self.timeout / SLICES)),))):
            pass

    def gather_text(self, text: str) -> list[str]:
        """Return every process's ``text``, in rank order, cut at 4 KiB.

        A collective of the whole world.
        """
        if self.world is None:
            return [text]
        _check(torch.empty(TEXT_BYTES, dtype=torch.uint8, device="cpu"), "gather", self.world)
        return _gather(text, TEXT_BYTES, self.world)

    @contextmanager
    def all_or_none(self) -> Generator[None]:
        """Raise on every rank the first RunError that any rank raises inside the block.

        A collective of the world, so the block itself must not contain one that a failing rank
        would skip.
        """
        error: RunError | None = None
        try:
            yield
        except RunError as caught:
            error = caught
        texts = self.gather_text(f"{error.status} {one_line(error)}" if error else "")
        if first := next(filter(None, texts), ""):
            raise error or error_from_text(first)


@dataclass(frozen=True)
class Meeting:
    """What the processes found when they met: a store for ``opened``, the same on all."""

    store: dist.Store | None = None
    attempt: int = 0  # how often any of them was started again
    launcher: str = ""  # which start of a launcher this is, by rank 0's word


def meet(same: Mapping[str, Any], timeout: float = 120.0) -> Meeting:
    """Find the other processes and see that ``same`` is the same on all.

    ``same``: what they must agree on, by name, as JSON knows it.  Where no launcher vouches for
    the address a process tries it for ``host.MEETING`` s, else for ``timeout``.  Raises
    LaunchError.
    """
    where = environment.read()
    if where.size == 1:
        return Meeting(None, where.attempt, environment.launcher())
    address, port = environment.master()
    environment.check_network(where, timeout)
    patience = timedelta(seconds=max(timeout, environment.MEETING))
    mine = {"attempt": where.attempt, "launcher": environment.launcher(), "same": same}
    try:
        # Agents count their restarts each for itself; a store that is rank 0's is a new one.
        prefix = f"modelpar/{where.attempt}" if where.agent_has_store else "modelpar"
        store = dist.PrefixStore(
            prefix,
            dist.TCPStore(
                address,
                port,
                None if where.agent_has_store else where.size,
                is_master=where.rank == 0 and not where.agent_has_store,
                timeout=patience,
                multi_tenant=True,  # a process may open a second group at its own address
            ),
        )
        if store.add(f"rank {where.rank}", 1) > 1:
            raise LaunchError(
                f"RANK={where.rank}: two processes say so; number them 0 to {where.size - 1}"
            )
        told = [json.loads(text) for text in _exchange(store, "same", json.dumps(mine), where)]
        store.set(f"read {where.rank}", "")
        if where.rank == 0:  # it may take the store along when it ends
            store.wait([f"read {rank}" for rank in range(where.size)])
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {where.rank} of {where.size}: the processes did not meet at {address}:{port} "
            f"({one_line(error).partition('. ')[0][:200]})"
        ) from None
    first = told[0]["same"]
    for rank, other in enumerate(one["same"] for one in told):
        for key in first.keys() | other.keys():
            here, there = (json.dumps(one.get(key)) for one in (other, first))
            if here != there:
                raise LaunchError(
                    f"rank {rank} has {key}={here}, rank 0 has {there}; start all with the same"
                )
    return Meeting(store, max(one["attempt"] for one in told), told[0]["launcher"])


def _exchange(store: dist.Store, key: str, text: str, where: environment.Environment) -> list[str]:
    """Tell the store ``text`` under ``key``; return all ranks', as soon as all have told it."""
    keys = [f"{key} {rank}" for rank in range(where.size)]
    store.set(keys[where.rank], text)
    store.wait(keys)
    return [store.get(one).decode() for one in keys]


def prepare_together(prepare: Callable[[], Any], store: dist.Store | None, timeout: float) -> Any:
    """Return what ``prepare`` returns here, once it has returned on all that have met.

    That may take hours, since a host may have to read all images first; each shows meanwhile in
    ``store``, which is that of ``meet``, that it lives.  Raises what ``prepare`` raises here, and
    PeerLostError where it failed on another process, or where one shows nothing for ``timeout`` s.
    """
    if store is None:
        return prepare()
    where = environment.read()
    with _beating(store, f"alive {where.rank}", timeout / SLICES):
        try:
            prepared = prepare()
        except BaseException as error:
            with suppress(RuntimeError):  # the store is gone: nobody is left to be told
                store.set("failed", f"rank {where.rank} is not ready: {one_line(error)}")
            if where.rank == 0 and not where.agent_has_store:  # it takes the store along
                time.sleep(TOLD_WITHIN)
            raise
        with comm_errors("prepare"):
            store.set(f"ready {where.rank}", "")
            _await_ready(store, where.size, timeout)
    return prepared


@contextmanager
def _beating(store: dist.Store, key: str, pause: float) -> Generator[None]:
    """Count ``key`` up every ``pause`` s, in a thread: whoever reads it knows that this lives."""
    over = Event()

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone: who waits for it says so
            while not over.wait(pause):
                store.add(key, 1)

    Thread(target=beat, name="alive", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _await_ready(store: dist.Store, size: int, timeout: float) -> None:
    """Wait for all to be ready; raises PeerLostError for one that has failed or is silent."""
    ready = [f"ready {rank}" for rank in range(size)]
    beats, heard = [-1] * size, [0.0] * size
    while not store.check(ready):
        if store.check(["failed"]):
            raise PeerLostError(store.get("failed").decode())
        now = time.monotonic()
        for rank in range(size):
            count = store.add(f"alive {rank}", 0)
            if count != beats[rank]:
                beats[rank], heard[rank] = count, now
            elif now - heard[rank] > timeout:
                raise PeerLostError(
                    f"rank {rank} is gone or silent before it is ready; see what its host says"
                )
        time.sleep(environment.RETRY)


@contextmanager
def process_mesh(
    columns: int,
    device: str = "auto",
    timeout: float = 120.0,
    *,
    threads: int | None = None,
    tf32: bool = False,
    checked: bool = False,
    store: dist.Store | None = None,
) -> Generator[Mesh]:
    """Start the process group that the launcher's environment describes; end it on the way out.

    ``timeout`` in s holds for every collective; ``checked``: each is compared first.  A world of
    one process needs no group.  ``store``: of ``meet``, which is called where none is given.  For
    ``threads`` and ``tf32`` see ``host.share_cores`` and ``host.set_up``.

    Raises LaunchError where the group does not start.
    """
    where = environment.read()
    size = where.size
    replicas = environment.check_world(columns, 1, size)
    kind = choose_device(device, where.local_size)
    place = torch_device(kind, where.local_rank)
    kept = set_up(place, tf32=tf32)
    threads = set_threads(where.local_size, threads)
    if size == 1:
        yield Mesh(place, threads=threads, keeps_memory=kept)
        return
    if where.one_host:  # no port is open to others
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if kind == "cuda" and not dist.is_nccl_available():
        raise LaunchError(
            "this torch has no NCCL for GPUs to talk by; install another, or device=cpu"
        )
    store = store or meet({}, timeout).store
    wait = timedelta(seconds=timeout)
    try:
        if store is not None:
            store.set_timeout(wait)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=wait,
            store=store,
            rank=where.rank,
            world_size=size,
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
        if checked:
            for group, ranks in (
                (pair, grid.tolist()),
                (peers, grid.t().tolist()),
                (control, [list(range(size))]),
                (aside, [list(range(size))]),
            ):
                twin, _ = dist.new_subgroups_by_enumeration(ranks, timeout=wait, backend="gloo")
                own = cast("dist.ProcessGroup", group)
                _CHECKS[own.group_name] = _Check(cast("dist.ProcessGroup", twin))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {where.rank}: no process group ({one_line(error)[:300]})"
        ) from None
    try:
        replica, column = axes.get_coordinate() or (0, 0)
        yield Mesh(
            place,
            threads=threads,
            keeps_memory=kept,
            timeout=timeout,
            replicas=replicas,
            columns=columns,
            replica=replica,
            column=column,
            pair=axes.get_group("column") if columns > 1 else None,
            replica_group=axes.get_group("replica") if replicas > 1 else None,
            world=cast("dist.ProcessGroup", control),
            aside=cast("dist.ProcessGroup", aside),
        )
    finally:
        _CHECKS.clear()
        dist.destroy_process_group()


# -- collectives ---------------------------------------------------------------------------------

LOST: Final = re.compile(r"onnection|imed out|gloo|NCCL|[Ss]ocket")


@contextmanager
def comm_errors(operation: str) -> Generator[None]:
    """Turn a backend's many-line error into one line that says who is gone: PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", one_line(error)).partition(". ")[0]
        raise PeerLostError(
            f"{operation}: the other process is gone or silent ({reason[:160]})"
        ) from None


@dataclass
class _Check:
    """What ``comm.check`` keeps for one group: a second one to compare over, and a count."""

    twin: dist.ProcessGroup
    calls: int = 0


_CHECKS: Final[dict[str, _Check]] = {}  # by the group's name; empty unless ``opened`` checks


def _check(tensor: Tensor, operation: str, group: dist.ProcessGroup) -> None:
    """Raise ValueError for a tensor that gloo would garble, RuntimeError for calls that differ."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_contiguous():
        raise ValueError(f"{operation}: a tensor of shape {shape} is not contiguous")
    if tensor.dtype not in CARRIED:
        raise ValueError(f"{operation}: {tensor.dtype} is not carried")
    if check := _CHECKS.get(group.group_name):
        check.calls += 1
        call = f"{operation} {shape} {dtype}, call {check.calls}"
        calls = _gather(call, CALL_BYTES, check.twin)
        if len(set(calls)) > 1:
            told = "; ".join(f"{place}: {other}" for place, other in enumerate(calls))
            raise RuntimeError(f"the processes of a group call different collectives ({told})")


def exchange(tensor: Tensor, pair: dist.ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
    """Start one send and one receive of equal shape and dtype between the two columns.

    A collective of ``pair``.  Returns the tensor that will hold the peer's values, and a function
    that waits for both; until then neither tensor may be touched.  Raises PeerLostError.
    """
    _check(tensor, "swap", pair)
    received = torch.empty_like(tensor)
    peer = dist.get_global_rank(pair, 1 - dist.get_rank(pair))
    with comm_errors("swap"):
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, peer, group=pair),
                dist.P2POp(dist.irecv, received, peer, group=pair),
            ]
        )

    def wait() -> None:
        with comm_errors("swap"):
            for work in works:
                work.wait()

    return received, wait


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` in place over ``group`` (None: this process alone) and return it."""
    if group is not None:
        _check(tensor, "sum", group)
        with comm_errors("sum"):
            dist.all_reduce(tensor, group=group)
    return tensor


def _gather(text: str, size: int, group: dist.ProcessGroup) -> list[str]:
    """Return the text of each process of ``group``, cut at ``size`` bytes."""
    own = torch.zeros(size, dtype=torch.uint8, device="cpu")
    encoded = text.encode(errors="backslashreplace")[:size]
    if encoded:
        own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    texts = [torch.empty_like(own) for _ in range(group.size())]
    with comm_errors("gather"):
        dist.all_gather(texts, own, group=group)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in texts]


def first_complaint(complaint: str, mesh: Mesh) -> str:
    """Return the first process's complaint that is not empty, the same on all; else nothing.

    A collective of the whole world.
    """
    return next(filter(None, mesh.gather_text(complaint)), "")
