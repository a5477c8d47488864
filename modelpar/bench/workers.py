"""The processes of one contender: started once, and idle while other contenders are timed."""

import ctypes
import multiprocessing
import os
import signal
import socket
import time
import traceback
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch.profiler import profile

from modelpar.bench import link
from modelpar.bench.steps import CONTENDERS, make
from modelpar.device import choose_device, num_cores, torch_device
from modelpar.distributed import Mesh, process_mesh
from modelpar.errors import LaunchError, RunError, one_line
from modelpar.settings import BenchmarkSettings

ANSWER_SECONDS: Final = 600.0  # for one answer: a slow link, a cold compile
PEAK_SIDE: Final = 2048  # rows of the square matrices whose product gives the peak
PEAK_PRODUCTS: Final = 14  # the first two are not timed


class Workers:
    """The processes of one contender at one precision and batch size."""

    def __init__(
        self, name: str, precision: str, batch_size: int, settings: BenchmarkSettings
    ) -> None:
        self.name, self.precision, self.batch_size = name, precision, batch_size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # quiet profilers, inherited by workers
        start = time.perf_counter()
        for rank in range(CONTENDERS[name].processes):
            pipe, other = context.Pipe()
            task = (name, precision, batch_size, settings)
            process = context.Process(target=_serve, args=(task, rank, port, other), daemon=True)
            process.start()
            other.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        self.start_s = max(answer["now"] for answer in self._answers()) - start  # with one step

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Return what ``method`` of ``_Worker`` returns on each rank; raises LaunchError."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: list[Any] = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                if not pipe.poll(ANSWER_SECONDS):
                    self._fail(f"no answer within {ANSWER_SECONDS:.0f} s")
                succeeded, answer = pipe.recv()
            except EOFError:
                process.join(5)
                memory = "; if memory ran out, use fewer contenders or precisions"
                hint = memory if process.exitcode == -signal.SIGKILL else ""
                self._fail(f"a process ended with status {process.exitcode}{hint}")
            if not succeeded:
                self._fail(answer)
            answers.append(answer)
        return answers

    def _fail(self, reason: str) -> NoReturn:
        self.close(wait=0)
        raise LaunchError(f"benchmark: {self.name} in {self.precision}: {reason}")

    def close(self, wait: float = 10) -> None:
        """End the processes; kill those that are still alive after ``wait`` s."""
        for pipe in self.pipes:
            with suppress(OSError):  # the process has ended
                pipe.send(None)
        for process in self.processes:
            process.join(wait)
            process.kill()
            process.join()


# -- inside a process ----------------------------------------------------------------------------


def _serve(
    task: tuple[str, str, int, BenchmarkSettings], rank: int, port: int, pipe: Connection
) -> None:
    """Set the contender up, take a first step, then answer until the benchmark ends."""
    name, _, _, settings = task
    size, hosts = CONTENDERS[name].processes, settings.link.hosts
    try:
        if hosts and size > 1:
            link.enter(hosts[rank])
        threads = settings.threads or max(1, num_cores() // size)
        local_size = 1 if hosts else size
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        numbers["LOCAL_WORLD_SIZE"] = local_size
        os.environ.update({key: str(number) for key, number in numbers.items()})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        device = choose_device(settings.device, size)
        if name == "plain":  # without the allocator's settings of ``process_mesh``
            torch.set_num_threads(threads)
            context = nullcontext(Mesh(torch_device(device, 0)))
        else:
            columns = size if name in {"pair", "in_turn"} else 1
            context = process_mesh(columns, device, settings.comm.timeout, threads=threads)
        with context as mesh:
            worker = _Worker(task, mesh)
            request: tuple[str, tuple[Any, ...]] | None = ("turn", (0,))
            while request is not None:
                method, arguments = request
                answer = getattr(worker, method)(*arguments)
                trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
                if trim is not None:  # idle contenders must leave memory to the others
                    trim(0)
                pipe.send((True, answer))
                request = pipe.recv()
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark has ended
    except BaseException as error:  # noqa: BLE001 - the benchmark reports it
        if not isinstance(error, RunError):
            traceback.print_exc()
        pipe.send((False, one_line(error)))


class _Worker:
    """What one process answers."""

    def __init__(self, task: tuple[str, str, int, BenchmarkSettings], mesh: Mesh) -> None:
        _, self.precision, _, _ = task
        self.mesh = mesh
        self.step = make(*task, mesh)

    def turn(self, steps: int) -> dict[str, Any]:
        """Take a step that is not timed, then ``steps`` that are; return what they cost."""
        self._step()
        sent, counted, seconds = link.bytes_sent(), self.step.bytes_sent(), list[float]()
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
        return {
            "now": time.perf_counter(),
            "seconds": seconds,
            "sent": (link.bytes_sent() - sent) // max(1, steps),
            "counted": (self.step.bytes_sent() - counted) // max(1, steps),
            "peak_bytes": self._peak_bytes(),
        }

    def _step(self) -> None:
        self.step.take()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_bytes(self) -> int:
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        (high,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(high) * 1024

    def peak(self) -> float:
        """Return this process's best GFLOP/s in a matrix product.

        All processes compute at the same time, so they share the machine as in training.
        """
        dtype = getattr(torch, self.precision)
        square = torch.randn(PEAK_SIDE, PEAK_SIDE, device=self.mesh.device, dtype=dtype)
        seconds: list[float] = []
        for _ in range(PEAK_PRODUCTS):
            start = time.perf_counter()
            torch.mm(square, square)
            if square.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * PEAK_SIDE**3 / min(seconds[2:]) / 1e9

    def trace(self, prefix: str) -> str:
        """Write a Chrome trace of one step, for Perfetto or chrome://tracing; return its path."""
        path = Path(f"{prefix}-rank{self.mesh.rank}.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with profile() as profiler:
            self._step()
        profiler.export_chrome_trace(str(path))
        return str(path)
