"""The processes of a contender: started once, held idle while the others have their turns."""

import ctypes
import multiprocessing
import os
import signal
import socket
import statistics
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from omegaconf import OmegaConf
from torch import Tensor

from modelpar import config
from modelpar.bench import anatomy, wire
from modelpar.bench.steps import CONTENDERS, make, on_column, plan_of
from modelpar.device import choose_device, torch_device
from modelpar.distributed import Mesh, process_mesh
from modelpar.errors import LaunchError, RunError, one_line
from modelpar.settings import BenchmarkSettings
from modelpar.training.engine import DTYPES

PATIENCE: Final = 600.0  # s for one answer: a slow link, a cold compile
PEAK_SIDE: Final = 2048  # rows of the square matrices whose product is the machine's peak
PEAK_MAPS: Final = (32, 256, 64)  # images, maps and side of the 1 x 1 convolution held against it


class World:
    """One contender at one precision and batch size, on processes of its own."""

    def __init__(
        self, name: str, precision: str, batch_size: int, settings: BenchmarkSettings
    ) -> None:
        self.name, self.precision, self.batch_size = name, precision, batch_size
        context = multiprocessing.get_context("spawn")
        size = CONTENDERS[name].processes
        port = _free_port()
        # inherited: the profiler reads it as torch is imported, and talks of its own doings else
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        began = time.perf_counter()
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=((name, precision, batch_size), asdict(settings), rank, port, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        ended = [answer["now"] for answer in self._answers()]
        self.start_s = max(ended) - began  # until the first step is over

    def ask(self, question: str, *arguments: Any) -> list[Any]:
        """Return what every rank answers, in rank order; raises LaunchError for one that died."""
        for pipe in self.pipes:
            pipe.send((question, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: list[Any] = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                if not pipe.poll(PATIENCE):
                    self._fail(f"no answer within {PATIENCE:.0f} s")
                fine, answer = pipe.recv()
            except EOFError:
                process.join(5)
                often = ", often for want of memory: give fewer contenders or precisions"
                killed = process.exitcode == -signal.SIGKILL
                self._fail(
                    f"a process ended with status {process.exitcode}{often if killed else ''}"
                )
            if not fine:
                self._fail(answer)
            answers.append(answer)
        return answers

    def _fail(self, reason: str) -> NoReturn:
        self.kill()
        raise LaunchError(f"benchmark: {self.name} in {self.precision}: {reason}")

    def close(self) -> None:
        """Let the processes end."""
        for pipe in self.pipes:
            with suppress(OSError):  # a process that is gone
                pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        """End the processes at once."""
        for process in self.processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# -- inside a process ----------------------------------------------------------------------------


def _serve(
    task: tuple[str, str, int], plain: dict[str, Any], rank: int, port: int, pipe: Connection
) -> None:
    name, precision, batch_size = task
    settings: BenchmarkSettings = config.typed("benchmark", OmegaConf.create(plain))
    size = CONTENDERS[name].processes
    try:
        hosts = settings.link.hosts
        if hosts and size > 1:
            wire.enter(hosts[rank])
        cores = len(os.sched_getaffinity(0))
        threads = settings.threads or max(1, cores // size)
        device = choose_device(settings.device, size)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE="1" if hosts else str(size),
            MASTER_PORT=str(port),
        )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        columns = size if name in {"pair", "in_turn"} else 1
        if name == "plain":  # as torch comes, with its allocator's own settings
            torch.set_num_threads(threads)
            mesh_of = nullcontext(Mesh(torch_device(device, 0)))
        else:
            mesh_of = process_mesh(columns, device, settings.comm.timeout, threads=threads)
        with mesh_of as mesh:
            worker = _Worker(name, precision, batch_size, settings, mesh)
            asked: tuple[str, tuple[Any, ...]] | None = ("turn", (0,))
            while asked is not None:
                question, arguments = asked
                answer = getattr(worker, question)(*arguments)
                _give_back()
                pipe.send((True, answer))
                asked = pipe.recv()
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark is gone
    except BaseException as error:  # noqa: BLE001 - the benchmark says it
        if not isinstance(error, RunError):
            traceback.print_exc()
        pipe.send((False, one_line(error)))


class _Worker:
    """What a process answers."""

    def __init__(
        self, name: str, precision: str, batch_size: int, settings: BenchmarkSettings, mesh: Mesh
    ) -> None:
        self.mesh, self.precision = mesh, precision
        self.trained = make(name, precision, batch_size, settings, mesh, plan_of(settings))
        column = on_column(self.trained)
        self.link = None if column is None else column.link

    def turn(self, steps: int) -> dict[str, Any]:
        """Take a step that does not count, then ``steps`` that do; return what they took."""
        self._step()
        crossed = self.link.seconds if self.link else 0.0
        counted = self.link.bytes_sent if self.link else 0
        before, seconds = wire.sent(), list[float]()
        for _ in range(steps):
            began = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - began)
        return {
            "now": time.perf_counter(),
            "seconds": seconds,
            "crossing_s": (self.link.seconds - crossed if self.link else 0.0) / max(1, steps),
            "counted": (self.link.bytes_sent - counted if self.link else 0) // max(1, steps),
            "wire": (wire.sent() - before) // max(1, steps),
            "peak_bytes": self._peak_bytes(),
        }

    def _step(self) -> None:
        self.trained.step()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_bytes(self) -> int:
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        (high,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(high) * 1024

    def peak(self) -> dict[str, float]:
        """Return this process's best GFLOP/s in a matrix product and in a 1 x 1 convolution.

        Asked of both processes at once, they share the machine as in training.
        """
        dtype, device = DTYPES[self.precision], self.mesh.device
        square = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype)
        images, count, side = PEAK_MAPS
        maps = torch.randn(images, count, side, side, device=device, dtype=dtype)
        maps = maps.contiguous(memory_format=torch.channels_last)
        kernels = torch.randn(count, count, 1, 1, device=device, dtype=dtype)
        return {
            "matrix": _fastest(2 * PEAK_SIDE**3, torch.mm, square, square),
            "convolution": _fastest(2 * images * side**2 * count**2, torch.conv2d, maps, kernels),
        }

    def alone(self, repeats: int) -> float:
        """Return the seconds that a step's swaps take when nothing is computed beside them."""
        if self.link is None:
            return 0.0
        sent: list[Tensor] = []
        transport = self.link.transport

        def note(tensor: Tensor) -> Any:
            sent.append(torch.zeros_like(tensor))
            return transport(tensor)

        self.link.transport = note
        self._step()
        self.link.transport = transport
        seconds: list[float] = []
        for _ in range(repeats):
            began = time.perf_counter()
            for tensor in sent:
                _, wait = transport(tensor)
                wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def anatomy(self) -> list[anatomy.Span]:
        """Return one step in spans."""
        self._step()
        with anatomy.waits_named(self.link):
            return anatomy.profiled(self._step, self.trained.net)


def _fastest(flop: int, product: Any, *operands: Tensor) -> float:
    """Return the best GFLOP/s of a dozen products after two that do not count."""
    seconds: list[float] = []
    for _ in range(14):
        began = time.perf_counter()
        product(*operands)
        if operands[0].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return flop / min(seconds[2:]) / 1e9


def _give_back() -> None:
    """Return freed memory to the system, so that all contenders fit beside each other."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
