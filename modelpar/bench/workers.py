"""The processes of one contender: started once, and idle while other contenders are timed."""

import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import time
import timeit
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import profile
from tqdm import tqdm

from modelpar.bench.steps import Contender, make
from modelpar.device import choose_device, num_cores
from modelpar.distributed import Mesh, process_mesh
from modelpar.errors import LaunchError, RunError, one_line

ANSWER_SECONDS: Final = 600.0  # for one answer: a slow link, a cold compile
PEAK_SIDE: Final = 2048  # rows of the square matrices whose product gives the peak
PEAK_PRODUCTS: Final = 14  # the first two are not timed
CLONE_NEWNET: Final = 0x40000000  # sched.h
INTERFACE: Final = "wire"  # launch/slow_link.sh
BURST_SECONDS: Final = 0.002  # what the bucket holds: two kernel ticks at the rate
SMALLEST_BURST: Final = 128 << 10  # bytes: two of the largest segments


class Workers:
    """The processes of one contender."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.ranks: list[tuple[Any, Connection]] = []  # processes, and the pipes to them
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # quiet profilers, inherited by workers
        start = time.perf_counter()
        for rank in range(contender.processes):
            pipe, other = context.Pipe()
            arguments = (contender, rank, port, other)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self.ranks.append((process, pipe))
        self.ask("turn", 0)
        self.start_s = time.perf_counter() - start  # with one step
        about = f"{contender.name} {contender.precision}, batch {contender.batch_size}"
        tqdm.write(f"modelpar: {about}: first step after {self.start_s:.1f} s")

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Return what ``method`` of ``_Worker`` returns on each rank; raises LaunchError."""
        for _, pipe in self.ranks:
            pipe.send((method, arguments))
        return [self._answer(*rank) for rank in self.ranks]

    def _answer(self, process: Any, pipe: Connection) -> Any:
        succeeded, answer = False, f"no answer within {ANSWER_SECONDS:.0f} s"
        try:
            if pipe.poll(ANSWER_SECONDS):
                succeeded, answer = pipe.recv()
        except EOFError:
            process.join(5)
            answer = f"a process ended with status {process.exitcode}"
            if process.exitcode == -signal.SIGKILL:
                answer += "; if memory ran out, use fewer contenders or precisions"
        if succeeded:
            return answer
        self.close(wait=0)
        raise LaunchError(
            f"benchmark: {self.contender.name} in {self.contender.precision}: {answer}"
        )

    def close(self, wait: float = 10) -> None:
        """End the processes; kill those that are still alive after ``wait`` s."""
        for _, pipe in self.ranks:
            with suppress(OSError):  # the process has ended
                pipe.send(None)
        for process, _ in self.ranks:
            process.join(wait)
            process.kill()
            process.join()


# -- inside a process ----------------------------------------------------------------------------


def _serve(contender: Contender, rank: int, port: int, pipe: Connection) -> None:
    """Set the contender up, then call methods of ``_Worker`` until the benchmark ends."""
    size, settings = contender.processes, contender.settings
    hosts = settings.link.hosts
    try:
        if hosts and size > 1:
            enter_network(hosts[rank])
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        numbers["LOCAL_WORLD_SIZE"] = 1 if hosts else size
        os.environ.update({key: str(number) for key, number in numbers.items()})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        threads = settings.threads or max(1, num_cores() // size)
        device = choose_device(settings.device, size)
        if contender.name == "plain":  # without the allocator's settings of ``process_mesh``
            torch.set_num_threads(threads)
            context = nullcontext(Mesh(torch.device("cuda:0" if device == "cuda" else "cpu")))
        else:
            columns = size if contender.name in {"pair", "in_turn"} else 1
            context = process_mesh(columns, device, settings.comm.timeout, threads=threads)
        with context as mesh:
            worker = _Worker(contender, mesh)
            while request := pipe.recv():
                method, arguments = request
                answer = getattr(worker, method)(*arguments)
                with suppress(AttributeError):  # glibc: idle contenders leave memory to others
                    ctypes.CDLL(None).malloc_trim(0)
                pipe.send((True, answer))
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark has ended
    except BaseException as error:  # noqa: BLE001 - the benchmark reports it
        if not isinstance(error, RunError):
            traceback.print_exc()
        pipe.send((False, one_line(error)))


class _Worker:
    """What one process answers."""

    def __init__(self, contender: Contender, mesh: Mesh) -> None:
        self.mesh, self.dtype = mesh, getattr(torch, contender.precision)
        self.take_step = make(contender, mesh)
        self.synchronize = torch.get_device_module(mesh.device).synchronize

    def _step(self) -> None:
        self.take_step()
        self.synchronize()

    def turn(self, steps: int) -> dict[str, Any]:
        """Take a step that is not timed, then ``steps`` that are; return what they cost."""
        self._step()
        before = bytes_sent()
        seconds = timeit.repeat(self._step, number=1, repeat=steps)
        sent = (bytes_sent() - before) // max(1, steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.mesh.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return {"seconds": seconds, "sent": sent, "peak_bytes": peak}

    def peak(self) -> float:
        """Return this process's best GFLOP/s in a matrix product.

        All processes compute at the same time, so they share the machine as in training.
        """
        side = PEAK_SIDE
        square = torch.randn(side, side, device=self.mesh.device, dtype=self.dtype)

        def product() -> None:
            torch.mm(square, square)
            self.synchronize()

        seconds = timeit.repeat(product, number=1, repeat=PEAK_PRODUCTS)
        return 2 * side**3 / min(seconds[2:]) / 1e9

    def trace(self, prefix: str) -> str:
        """Write a Chrome trace of one step, for Perfetto or chrome://tracing; return its path."""
        path = Path(f"{prefix}-rank{self.mesh.rank}.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with profile() as profiler:
            self._step()
        profiler.export_chrome_trace(str(path))
        return str(path)


# -- the two network namespaces that launch/slow_link.sh creates ----------------------------------


def enter_network(host: str) -> None:
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


def limit_link(hosts: Sequence[str], rate: float | None) -> None:
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
