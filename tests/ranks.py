"""Real processes, held for a test module: functions go in, values come out."""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from modelpar import distributed

# One server imports torch and the package once; all ranks of all tests are forked from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks", "modelpar.launch", "modelpar.training.trainer"])
# In s; a hang is the usual failure of a collective.  Less than pytest's timeout, so that stacks
# are shown, and more than a cold compile takes beside the other checks of .ci/run.
TIMEOUT = 240.0


def return_memory() -> None:
    """Give freed memory back to the system, which a process of ours otherwise keeps."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(
    rank: int, size: int, columns: int, port: int, timeout: float, stacks: Path, pipe: Connection
) -> None:
    faulthandler.register(signal.SIGUSR2, (stacks / str(rank)).open("w"))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    with distributed.process_mesh(columns, "cpu", timeout) as ranks:
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                pipe.send((True, function(ranks, *arguments)))
            except BaseException:  # noqa: BLE001 - the test process raises it
                pipe.send((False, traceback.format_exc()))
            return_memory()


class Ranks:
    """``size`` gloo processes; ``run`` calls a function on all of them with their mesh."""

    def __init__(self, size: int, columns: int = 2, timeout: float = 60.0) -> None:
        self.settings = (size, columns, timeout)
        self._start()

    def _start(self) -> None:
        size, columns, timeout = self.settings
        port = _free_port()
        self.folder = tempfile.TemporaryDirectory()
        stacks = Path(self.folder.name)
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            given = (rank, size, columns, port, timeout, stacks, theirs)
            process = CONTEXT.Process(target=_serve, args=given, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return ``function(mesh, *arguments)`` of every rank, in rank order."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        try:
            results = [self._answer(rank) for rank in range(len(self.pipes))]
        except BaseException:  # a late answer must not be taken for that of the next test
            self._kill()
            self._start()
            raise
        for rank, (fine, value) in enumerate(results):
            if not fine:
                raise AssertionError(f"rank {rank}:\n{value}")
        return [value for _, value in results]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self.pipes[rank].poll(TIMEOUT):
            where = self._stacks()
            raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT} s\n{where}")
        return self.pipes[rank].recv()

    def _stacks(self) -> str:
        """Return where each rank is."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR2)
        time.sleep(1)
        files = sorted(Path(self.folder.name).iterdir())
        return "\n".join(f"rank {path.name}: {path.read_text()}" for path in files)

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()
