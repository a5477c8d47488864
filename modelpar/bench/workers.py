"""The processes of one contender: started once, and idle while other contenders are timed."""

import ctypes
import multiprocessing
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import time
import timeit
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from modelpar.bench.steps import Contender, Step, make
from modelpar.device import check_precision, choose_device, num_cores
from modelpar.distributed import Mesh, process_mesh
from modelpar.errors import LaunchError, RunError, one_line
from modelpar.progress import show
from modelpar.tracing import traced

ANSWER_SECONDS: Final = 600.0  # for one answer: a slow link, a cold compile
PEAK_SIDE: Final = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product gives the peak
PEAK_PRODUCTS: Final = 14  # the first two are not timed
COPIED: Final = 1 << 30  # bytes, which no cache of a GPU holds
WARM_UP_STEPS: Final = {"cpu": 1, "cuda": 6}  # some of them record graphs
CLONE_NEWNET: Final = 0x40000000  # sched.h
TCP_COUNTERS: Final = struct.Struct("=200x2Q")  # bytes_sent and bytes_retrans, linux/tcp.h
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
        for rank in range(contender.processes):
            pipe, other = context.Pipe()
            arguments = (contender, rank, port, other, time.time())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self.ranks.append((process, pipe))
        self.start_s = 0.0  # from the start of the processes until the first step, without waits
        self.failed = False  # its processes have ended

    def begin(self, method: str, *arguments: Any) -> None:
        """Have each rank call ``method`` of ``_Worker``; ``finish`` returns what it returns."""
        for _, pipe in self.ranks:
            with suppress(OSError):  # the process has ended
                pipe.send((method, arguments))

    def finish(self) -> list[Any]:
        """Return the answer of each rank; raises LaunchError."""
        return [self._answer(*rank) for rank in self.ranks]

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Return what ``method`` of ``_Worker`` returns on each rank; raises LaunchError."""
        self.begin(method, *arguments)
        return self.finish()

    def started(self) -> None:
        """Wait for a part of the start, and add the time it took; raises LaunchError."""
        self.start_s += max(self.finish())

    def report(self) -> None:
        """Print how long the start took."""
        contender = self.contender
        about = f"{contender.name} {contender.precision}, batch {contender.batch_size}"
        show(f"modelpar: {about}: first step after {self.start_s:.1f} s")

    def _answer(self, process: Any, pipe: Connection) -> Any:
        succeeded, answer = False, f"no answer within {ANSWER_SECONDS:.0f} s"
        try:
            if pipe.poll(ANSWER_SECONDS):
                succeeded, answer = pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            answer = f"a process ended with status {process.exitcode}"
            if process.exitcode == -signal.SIGKILL:
                answer += "; if memory ran out, use fewer contenders, precisions or batch sizes"
        if succeeded:
            return answer
        self.failed = True
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


def _serve(contender: Contender, rank: int, port: int, pipe: Connection, started: float) -> None:
    """Join the contender's processes, then call methods of ``_Worker`` until the benchmark ends.

    ``started`` is when the process was started, in s since the epoch.
    """
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
        check_precision(device, contender.precision)
        if (contender.name, device) == ("plain", "cpu"):  # with the system's allocator
            torch.set_num_threads(threads)
            context = nullcontext(Mesh(torch.device(device)))
        else:
            columns = size if contender.name in {"pair", "in_turn"} else 1
            context = process_mesh(columns, device, settings.comm.timeout, threads=threads)
        with context as mesh:
            worker = _Worker(contender, mesh, started)
            while request := pipe.recv():
                method, arguments = request
                answer = getattr(worker, method)(*arguments)
                with suppress(AttributeError):  # glibc: idle contenders leave memory to others
                    ctypes.CDLL(None).malloc_trim(0)
                pipe.send((True, answer))
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark has ended
    except BaseException as error:  # noqa: BLE001 - the benchmark reports it
        if not isinstance(error, (RunError, RuntimeError)):  # torch's: no memory, no compiler
            traceback.print_exc()
        pipe.send((False, one_line(error)[:300]))


class _Worker:
    """What one process answers."""

    steps: tuple[Step, ...]  # the first, and the others

    def __init__(self, contender: Contender, mesh: Mesh, started: float) -> None:
        self.contender, self.mesh, self.started = contender, mesh, started
        self.on_gpu, self.peak_bytes = mesh.device.type == "cuda", 0
        self.synchronize = torch.get_device_module(mesh.device).synchronize

    def prepare(self) -> float:
        """Make the step; return the time in s since the process was started."""
        self.steps = make(self.contender, self.mesh)
        return time.time() - self.started

    def tune(self) -> float:
        """On a GPU take the first step, alone, see ``make``; return the time in s."""
        if not self.on_gpu:
            return 0.0
        first, step = self.steps
        seconds = timeit.timeit(first, number=1)
        if first is not step:  # which is compiled and uses less memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return seconds

    def warm_up(self) -> float:
        """Take the warm-up steps; return the time in s."""
        steps = partial(self._take, WARM_UP_STEPS[self.mesh.device.type])
        seconds = timeit.timeit(steps, number=1)
        if self.on_gpu:  # later peaks would include the matrices of ``peak``
            self.peak_bytes = self.peak_bytes or torch.cuda.max_memory_allocated()
        return seconds

    def _take(self, number: int = 1) -> None:
        for _ in range(number):
            self.steps[-1]()
        self.synchronize()

    def turn(self, steps: int) -> dict[str, Any]:
        """Warm up, then take ``steps`` steps; return what each costs.

        On a GPU all steps are taken between two synchronizations, so ``seconds`` has only their
        mean: a step that waited for the device would hide that steps are launched ahead.
        """
        self.warm_up()
        before = bytes_sent()
        together = steps if self.on_gpu else 1
        take = partial(self._take, together)
        seconds = [s / together for s in timeit.repeat(take, number=1, repeat=steps // together)]
        sent = (bytes_sent() - before) // steps
        peak = self.peak_bytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": seconds, "sent": sent, "peak_bytes": peak}

    def peak(self) -> dict[str, float]:
        """Return this process's best GFLOP/s in a matrix product, by the name of the precision.

        All processes compute at the same time, so they share the machine as in training.  On a
        GPU also return ``copy``: the GB/s that copies within its memory read and write.
        """
        side, precision = PEAK_SIDE[self.mesh.device.type], self.contender.precision
        square = torch.randn(side, side, device=self.mesh.device, dtype=getattr(torch, precision))
        found = {precision: 2 * side**3 / self._best(partial(torch.mm, square, square)) / 1e9}
        if self.on_gpu:
            bytes_ = torch.empty(COPIED, dtype=torch.uint8, device=self.mesh.device)
            copy = partial(torch.empty_like(bytes_).copy_, bytes_)
            found["copy"] = 2 * COPIED / self._best(copy) / 1e9
        return found

    def _best(self, work: Callable[[], object]) -> float:
        """Return the least time of ``work`` in s."""

        def wait() -> None:
            work()
            self.synchronize()

        return min(timeit.repeat(wait, number=1, repeat=PEAK_PRODUCTS)[2:])

    def launches(self) -> dict[str, int]:
        """Return what the processor launches on the GPU in a step, and the kernels that run.

        A CUDA graph is one launch of many kernels.
        """
        with profile() as profiler:
            self._take()
        events: Any = profiler.events()
        ran = [one for one in events if one.device_type == DeviceType.CUDA]
        kernels = [
            one
            for one in ran
            if not one.is_user_annotation and not re.match("Mem(cpy|set)", one.name)
        ]
        launched = [one for one in events if re.match("cu(da)?(Graph)?Launch", one.name)]
        return {"launches": len(launched), "kernels": len(kernels)}

    def trace(self, prefix: str) -> str:
        """Write a Chrome trace of one step, for Perfetto or chrome://tracing; return its path."""
        path = Path(f"{prefix}-rank{self.mesh.rank}.json.gz")
        with traced(path):
            self._take()
        return str(path)


def bytes_sent() -> int:
    """Return the bytes that this process has sent over its open TCP connections, without headers.

    The counters of an interface would include what other programs of the machine send.  Raises
    struct.error on Linux before 4.19, which does not count these bytes.
    """
    total = 0
    for path in filter(Path.is_socket, Path("/proc/self/fd").iterdir()):
        # A socket that does not use TCP has no such counters, which is an OSError.
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as one:
            found = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_COUNTERS.size)
            sent, sent_again = TCP_COUNTERS.unpack(found)
            total += sent - sent_again
    return total


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
